//! The daemon as tests build it to kill it at named points: `main.rs` and
//! nothing else, under a name of its own so that it never takes the place of
//! the real one.

#[path = "main.rs"]
mod program;

fn main() -> std::process::ExitCode {
    program::main()
}
