//! Fuzz targets: whatever reads bytes that somebody else wrote, and the mechanisms under random operations.
//!
//! What     one module for each target, with `run`, which panics if something is wrong, and `seeds`, inputs
//!          to start from. [`TARGETS`] lists them.
//! Why      plain functions: cargo-fuzz drives them with coverage (`cargo fuzz run device_url`), and
//!          `cargo xtask fuzz-smoke` with random changes of the seeds, on the stable toolchain.
//! Fails    by panicking. `cargo run --bin device_url -- FILE` runs one input again.

pub mod byte_size;
pub mod dax_label;
pub mod device_url;
pub mod maps_line;
pub mod operations;
pub mod page_word;
pub mod protocol;

use std::process::ExitCode;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, also that of its binary.
    pub name: &'static str,
    /// Runs it on one input.
    pub run: fn(&[u8]),
    /// Inputs that mean something.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 7] = [
    Target { name: "byte_size", run: byte_size::run, seeds: byte_size::seeds },
    Target { name: "dax_label", run: dax_label::run, seeds: dax_label::seeds },
    Target { name: "device_url", run: device_url::run, seeds: device_url::seeds },
    Target { name: "maps_line", run: maps_line::run, seeds: maps_line::seeds },
    Target { name: "protocol", run: protocol::run, seeds: protocol::seeds },
    Target { name: "page_word", run: page_word::run, seeds: page_word::seeds },
    Target { name: "operations", run: operations::run, seeds: operations::seeds },
];

/// Runs `target` on the contents of each file named on the command line.
pub fn replay(target: fn(&[u8])) -> ExitCode {
    for path in std::env::args_os().skip(1) {
        match std::fs::read(&path) {
            Ok(data) => target(&data),
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Seeds that are texts.
fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}
