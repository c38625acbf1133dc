//! The budget of bytes and requests.

use tokio::task::JoinHandle;

use crate::fetch::{Admission, Priority};

const BYTES: u64 = 100;
const SLOTS: u64 = 4;

const ALL: [Priority; 3] = [Priority::OnDemand, Priority::Prefetch, Priority::Background];

fn within(admission: &Admission) {
    let (bytes, slots) = admission.in_use();
    assert!(
        bytes <= BYTES && slots <= SLOTS,
        "{bytes} bytes, {slots} requests"
    );
}

async fn all(tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        task.await.expect("no task panics");
    }
}

/// Requests of every priority, most of them larger than what is left: all are
/// admitted in the end, and never more than the budget at once.
pub async fn never_exceeded_and_all_admitted() {
    let admission = Admission::new(BYTES, SLOTS);
    let requests = (0..6_u64).map(|number| {
        let admission = admission.clone();
        tokio::spawn(async move {
            let priority = ALL[number as usize % 3];
            let permit = admission.admit(priority, 20 + number * 15).await;
            within(&admission);
            tokio::task::yield_now().await;
            within(&admission);
            drop(permit);
        })
    });
    all(requests.collect()).await;
    assert_eq!(admission.in_use(), (0, 0));
}

/// Those who wait may go away at any moment, also while they are being
/// admitted: what they were given comes back.
pub async fn who_goes_away_keeps_nothing() {
    let admission = Admission::new(BYTES, SLOTS);
    let leaving: Vec<_> = (0..3)
        .map(|number| {
            let admission = admission.clone();
            tokio::spawn(async move {
                let _permit = admission.admit(ALL[number], 60).await;
                within(&admission);
            })
        })
        .collect();
    let staying = {
        let admission = admission.clone();
        tokio::spawn(async move {
            let _permit = admission.admit(Priority::OnDemand, BYTES).await;
            within(&admission);
        })
    };
    for task in leaving {
        task.abort();
        // Done or aborted.
        let _ = task.await;
    }
    staying.await.expect("no task panics");
    assert_eq!(admission.in_use(), (0, 0));
    let whole = admission.admit(Priority::OnDemand, BYTES).await;
    assert_eq!(admission.in_use(), (BYTES, 1));
    drop(whole);
}

/// Work that nobody waits for leaves room: with nothing but such work under
/// way and waiting, a reader is admitted although none of it ends.
pub async fn readers_find_room_beside_the_rest() {
    let admission = Admission::new(BYTES, SLOTS);
    let mut tasks = Vec::new();
    let (end, ended) = tokio::sync::watch::channel(false);
    for priority in [Priority::Prefetch, Priority::Background, Priority::Prefetch] {
        let (admission, mut ended) = (admission.clone(), ended.clone());
        tasks.push(tokio::spawn(async move {
            let _permit = admission.admit(priority, BYTES).await;
            let _ = ended.wait_for(|ended| *ended).await;
        }));
    }
    let reader = admission.admit(Priority::OnDemand, BYTES / 2).await;
    within(&admission);
    drop(reader);
    end.send_replace(true);
    all(tasks).await;
    assert_eq!(admission.in_use(), (0, 0));
}
