//! The `uhmm` command.
//!
//! What     [`args`] reads the command line; [`run`], [`doctor`], [`bench`], [`dax`] and [`man`] are the commands; [`exit`]
//!          is the one place that knows exit codes, [`print`] the one that writes to the standard files.
//! Owns     nothing that outlives a command, but the keeper process of `run`.
//! Fails    with a message that says what was wrong and what to do, and an exit code.
#![forbid(unsafe_code)]

mod args;
mod bench;
mod dax;
mod doctor;
mod exit;
mod man;
mod print;
mod run;

use clap::Parser;

use args::{Args, Verb};

fn main() {
    exit::with(match Args::parse().verb {
        Verb::Run(args) => run::run(&args),
        Verb::Doctor { json } => doctor::doctor(json),
        Verb::Bench { rows, json, quick } => bench::bench(&rows, json, quick),
        Verb::Dax { verb } => dax::dax(verb),
        Verb::Man { directory } => man::man(&directory),
    })
}
