//! Every situation under random schedules, and under ones that change the
//! running task rarely, at the few moments that matter (PCT).

use std::sync::Arc;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};
use sluice_interleavings::layers::Origin;
use sluice_interleavings::{budget, claims};

/// Changes of the running task that a PCT schedule has.
const DEPTH: usize = 3;

fn under<S: Scheduler + 'static, F: Future<Output = ()>>(
    scheduler: S,
    situation: impl Fn() -> F + Send + Sync + 'static,
) {
    let mut config = Config::new();
    // Of each task; a layer is compiled and read on it.
    config.stack_size = 1 << 20;
    Runner::new(scheduler, config).run(move || shuttle::future::block_on(situation()));
}

fn try_all<F: Future<Output = ()>>(
    schedules: usize,
    situation: impl Fn() -> F + Clone + Send + Sync + 'static,
) {
    under(RandomScheduler::new(schedules), situation.clone());
    under(PctScheduler::new(DEPTH, schedules), situation);
}

#[test]
fn readers_share_fetches() {
    try_all(2_000, claims::readers_share_fetches);
}

#[test]
fn abandoned_fetches_are_taken_over() {
    try_all(2_000, claims::abandoned_fetches_are_taken_over);
}

#[test]
fn a_stream_beside_readers_fetches_nothing_twice() {
    try_all(2_000, claims::a_stream_beside_readers_fetches_nothing_twice);
}

#[test]
fn a_failure_is_told_once_to_each() {
    try_all(2_000, claims::a_failure_is_told_once_to_each);
}

#[test]
fn the_budget_is_never_exceeded_and_all_are_admitted() {
    try_all(2_000, budget::never_exceeded_and_all_admitted);
}

#[test]
fn who_goes_away_keeps_nothing_of_the_budget() {
    try_all(2_000, budget::who_goes_away_keeps_nothing);
}

#[test]
fn readers_find_room_beside_the_rest() {
    try_all(2_000, budget::readers_find_room_beside_the_rest);
}

#[test]
fn readers_of_a_layer_fetch_each_byte_once() {
    let origin = Arc::new(Origin::default());
    try_all(300, move || {
        let origin = Arc::clone(&origin);
        async move { origin.readers_fetch_each_byte_once().await }
    });
}

#[test]
fn layers_with_the_same_chunks_wait_in_no_circle() {
    let origin = Arc::new(Origin::default());
    try_all(300, move || {
        let origin = Arc::clone(&origin);
        async move { origin.layers_that_share_wait_in_no_circle().await }
    });
}

#[test]
fn closing_a_layer_ends_every_wait() {
    let origin = Arc::new(Origin::default());
    try_all(300, move || {
        let origin = Arc::clone(&origin);
        async move { origin.a_close_ends_every_wait().await }
    });
}
