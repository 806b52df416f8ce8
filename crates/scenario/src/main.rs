//! Plays random scenarios on the devices `/dev/hmm_dmirror0` to `3` and prints what came of each step.
//!
//! | room        | holds                                                                     |
//! |-------------|---------------------------------------------------------------------------|
//! | `random`    | numbers that follow from a seed                                           |
//! | `operation` | what a scenario is made of, and its text                                  |
//! | `layout`    | what is known without any result, and in what results may differ          |
//! | `scenario`  | the scenario of a seed                                                    |
//! | `memory`    | the window: pages at fixed addresses, and touches that may fail           |
//! | `device`    | the requests of the kernel's `lib/test_hmm_uapi.h`                        |
//! | `child`     | a child that touches memory when it is told to                            |
//! | `play`      | one scenario, step by step                                                |
//!
//! It knows the device by its ABI only, and runs on the kernel's module `test_hmm` as it does, with the shim loaded
//! before it, on ours. Each line is `SEED STEP OPERATION [MARKS] | RESULT`; what stands left of the bar is the same
//! wherever it runs. Each seed has a process of its own, so that a seed that crashes or hangs spoils no other.

mod child;
mod device;
mod layout;
mod memory;
mod operation;
mod play;
mod random;
mod scenario;

use std::ops::RangeInclusive;
use std::process::ExitCode;

pub(crate) use play::touch;

const USAGE: &str = "usage: uhmm-scenario FIRST-LAST [--steps N]

Plays the scenarios of the seeds FIRST to LAST on /dev/hmm_dmirror0 to 3, and prints
what came of each step. --steps ends each scenario after so many.";

/// How long a seed may take, in seconds.
const PATIENCE: u32 = 60;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (seeds, steps) = match parse(&arguments) {
        Ok(parsed) => parsed,
        Err(why) => {
            eprintln!("uhmm-scenario: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    for seed in seeds {
        // SAFETY: the process has one thread, and the child goes on with a scenario of its own and ends.
        let process = unsafe { libc::fork() };
        if process == 0 {
            // SAFETY: ends the process if the scenario does not end by itself.
            unsafe { libc::alarm(PATIENCE) };
            play::play(seed, steps);
            return ExitCode::SUCCESS;
        }
        let end = child::ended(process);
        if end != "exit 0" {
            println!("{seed} - end | {end}");
        }
    }
    ExitCode::SUCCESS
}

/// The seeds, and how many steps of each.
fn parse(arguments: &[String]) -> Result<(RangeInclusive<u64>, usize), String> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text} is no number"));
    let (mut seeds, mut steps) = (None, usize::MAX);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--steps" {
            steps = number(rest.next().ok_or("--steps wants a number")?)? as usize;
        } else {
            let (first, last) = argument.split_once('-').unwrap_or((argument, argument));
            seeds = Some(number(first)?..=number(last)?);
        }
    }
    Ok((seeds.filter(|seeds| !seeds.is_empty()).ok_or("which seeds?")?, steps))
}
