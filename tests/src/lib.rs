//! End-to-end and conformance tests with one shared harness.
