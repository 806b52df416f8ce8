//! The chores of uhmm. `cargo xtask ci` runs every check and reports every failure, not the first.
//!
//! What     [`TASKS`], one row for each chore; a chore is a list of [`steps`] that need nothing of each other.
//! Why      a check that is one command away is made, and one that stops at the first failure is run again and
//!          again.
//! Fails    with exit code 1 if any step failed, 2 if there is no such chore.

#![forbid(unsafe_code)]

mod hmm_tests;
mod oracle;
mod steps;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use steps::{Outcome, Step};

/// A chore: its name, what it is for, its steps.
type Task = (&'static str, &'static str, fn(&[String]) -> Vec<Step>);

const TASKS: [Task; 10] = [
    ("ci", "every check below", |_| steps::ci()),
    ("fmt", "formats everything; --check only looks", steps::fmt),
    ("lint", "clippy and rustdoc, with no warning left", |_| steps::lint()),
    ("test", "the tests of the workspace", |_| steps::test()),
    ("loom", "the models of what threads do to each other", |_| steps::loom()),
    ("fuzz-smoke", "every fuzz target for a moment; --seconds N in all, --seed N", steps::fuzz_smoke),
    ("conformance", "the behaviour suites of hosts and devices, and the kernel's hmm-tests", |_| {
        steps::conformance()
    }),
    ("bench-smoke", "the figures, quickly; goals are not judged", |_| steps::bench_smoke()),
    ("man", "the manual pages, below the target directory", |_| steps::man()),
    ("first-run", "the first command of the README, against the same without uhmm", |_| steps::first_run()),
];

/// Not part of `ci`: it needs a kernel that is built elsewhere.
const ORACLE: &str = "oracle";
/// A step of `conformance`, which is no command of somebody else's.
const HMM_TESTS: &str = "hmm-tests";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let rest: Vec<String> = arguments.collect();
    if name == HMM_TESTS {
        return hmm_tests::run(&root(), &rest);
    }
    if name == ORACLE {
        return oracle::run(&root(), &rest);
    }
    let Some((_, _, steps)) = TASKS.iter().find(|(known, ..)| *known == name) else {
        eprintln!("usage: cargo xtask TASK\n");
        for (name, about, _) in TASKS {
            eprintln!("  {name:<12} {about}");
        }
        eprintln!("  {HMM_TESTS:<12} the last steps of conformance by themselves; --repeat N, --fallback");
        eprintln!("  {ORACLE:<12} our device against the kernel's in a virtual machine; not part of ci");
        return ExitCode::from(2);
    };
    run(&steps(&rest))
}

/// Runs all of `steps`, whatever becomes of each, and sums up.
fn run(steps: &[Step]) -> ExitCode {
    let mut outcomes = Vec::new();
    for step in steps {
        println!("\n=== {}: {}", step.name, step.line());
        let start = Instant::now();
        let outcome = step.run(&root());
        println!("=== {}: {outcome} after {:.0} s", step.name, start.elapsed().as_secs_f64());
        outcomes.push((step.name, outcome, start.elapsed()));
    }
    println!("\n=== summary");
    for (name, outcome, took) in &outcomes {
        println!("{:<14} {:>6.0} s  {outcome}", name, took.as_secs_f64());
    }
    let failed = outcomes.iter().filter(|(_, outcome, _)| *outcome != Outcome::Passed).count();
    if failed == 0 {
        println!("all {} steps passed", outcomes.len());
        ExitCode::SUCCESS
    } else {
        for (name, outcome, _) in &outcomes {
            if let Outcome::Failed(_, told) = outcome {
                println!("\n=== {name}: what it said\n{}", told.concat());
            }
        }
        println!("{failed} of {} steps failed", outcomes.len());
        ExitCode::FAILURE
    }
}

/// The top of the workspace.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(PathBuf::new, Path::to_path_buf)
}
