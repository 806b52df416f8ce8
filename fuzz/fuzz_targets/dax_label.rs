//! `cargo fuzz run dax_label`; without cargo-fuzz, runs the target once on each file that is named.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| uhmm_fuzz::dax_label::run(data));

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    uhmm_fuzz::replay(uhmm_fuzz::dax_label::run)
}
