# Everything here runs as root on Debian 12 or later, or Ubuntu. `make help`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
CARGO_HOME ?= $(HOME)/.cargo
export PATH := $(CARGO_HOME)/bin:$(PATH):/usr/sbin:/sbin

.PHONY: help
help: ## Lists the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: deps
deps: ## Installs what is missing (apt, rustup, cargo-deny)
	@scripts/install-dependencies

.PHONY: build
build: deps ## Builds `sluice` and `sluice-snapshotter` (release)
	cargo build --release --locked -p sluice-cli -p sluice-snapshotter

.PHONY: lint
lint: deps ## Formatting, clippy, dependency rules
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo deny check --hide-inclusion-graph bans licenses sources
	@scripts/check-advisories

.PHONY: test
test: lint ## Lint and every test, with real containerd, runc and registry
	cargo test --workspace --locked --doc
	cargo test --workspace --locked --lib --bins --tests

.PHONY: soak
soak: deps ## Everything at once for MINUTES (10): starts, reads, faults, kills; make soak MINUTES=60
	SLUICE_SOAK_MINUTES=$(or $(MINUTES),10) cargo test --locked -p sluice-tests --test soak -- --nocapture

.PHONY: fuzz
fuzz: ## Every fuzz target for SECONDS (60) under libFuzzer; takes nightly and cargo-fuzz
	@for crate in layer registry snapshotter; do \
	    for target in $$(cd $$crate && cargo +nightly fuzz list); do \
	        echo "== $$crate $$target"; \
	        found=$(CURDIR)/target/fuzz/$$crate/$$target; mkdir -p $$found/corpus $$found/artifacts; \
	        (cd $$crate && ASAN_OPTIONS=detect_odr_violation=0 cargo +nightly fuzz run $$target \
	            --target-dir $(CURDIR)/target/fuzz/build $$found/corpus fuzz/corpus/$$target -- \
	            -max_total_time=$(or $(SECONDS),60) -rss_limit_mb=1024 -artifact_prefix=$$found/artifacts/ -verbosity=0 -print_final_stats=1); \
	    done; \
	done

.PHONY: demo
demo: build ## Starts a 300 MB image over a 100 Mbit/s link, ordinarily and lazily
	cargo build --release --locked -p sluice-benches --bin demo
	@exec target/release/demo

.PHONY: bench
bench: demo ## The demo and the benchmarks of benches/
	cargo run --release --locked -p sluice-benches --bin warm_reads > target/warm_reads.json
	cargo run --release --locked -p sluice-benches --bin mounting > target/mounting.json
	cargo run --release --locked -p sluice-benches --bin snapshots > target/snapshots.json
	cargo run --release --locked -p sluice-benches --bin conversion > target/conversion.json

.PHONY: bench-cold-start
bench-cold-start: build ## Cold starts of eight programs; ARGS="--workloads java --mbit 100 --rounds 1"
	cargo run --release --locked -p sluice-benches --bin cold_start -- $(ARGS)

.PHONY: bench-fetching
bench-fetching: build ## Streams, downloads, many starts at once, recording; ARGS="stream --rounds 1"
	cargo run --release --locked -p sluice-benches --bin fetching -- $(ARGS) > target/fetching.json

.PHONY: clean
clean: ## Removes everything built, cached images included
	cargo clean
