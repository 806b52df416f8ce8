//! `cargo fuzz run device_url`; without cargo-fuzz, runs the target once on each file that is named.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| uhmm_fuzz::device_url::run(data));

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    uhmm_fuzz::replay(uhmm_fuzz::device_url::run)
}
