//! Exit codes, all of them.
//!
//! | code  | meaning                                                                  |
//! |-------|--------------------------------------------------------------------------|
//! | 0     | done                                                                     |
//! | 1     | it failed: no userfaultfd for this user, no memory, a file that cannot be written |
//! | 2     | the command line asks for something that cannot be                       |
//! | 126   | the program exists and cannot be executed                                |
//! | 127   | the program does not exist                                               |
//! | other | the program's own; a program that a signal ended ends uhmm by the same   |
//!
//! Where nobody reads what was asked for, it ends by SIGPIPE, as programs do.

use std::fmt::Display;

use rustix::process::Signal;
use uhmm_sys::child;

use crate::print;

/// It failed.
const FAILED: i32 = 1;
/// The command line is wrong; clap uses the same.
const USAGE: i32 = 2;
/// The program cannot be executed.
const NOT_EXECUTABLE: i32 = 126;
/// The program does not exist.
const NOT_FOUND: i32 = 127;

/// Why the command ends early, with what to say.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It failed.
    Failed(String),
    /// What was asked for cannot be.
    Usage(String),
    /// The program cannot be executed.
    NotExecutable(String),
    /// The program does not exist.
    NotFound(String),
    /// Nobody reads what was asked for.
    Unread,
}

impl Failure {
    /// A failure of uhmm or of the system.
    pub(crate) fn failed(why: impl Display) -> Self {
        Self::Failed(why.to_string())
    }

    /// A command line that cannot be carried out.
    pub(crate) fn usage(why: impl Display) -> Self {
        Self::Usage(why.to_string())
    }
}

/// How the command ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// All went well.
    Done,
    /// As the program did, by itself.
    Code(i32),
    /// As the program did, by this signal.
    Signal(i32),
}

impl End {
    /// The code that a shell shows.
    pub(crate) const fn code(self) -> i32 {
        match self {
            Self::Done => 0,
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Ends the process.
pub(crate) fn with(result: Result<End, Failure>) -> ! {
    let (code, why) = match result {
        Ok(End::Signal(signal)) => child::die_by(signal),
        Ok(end) => std::process::exit(end.code()),
        Err(Failure::Failed(why)) => (FAILED, why),
        Err(Failure::Usage(why)) => (USAGE, why),
        Err(Failure::NotExecutable(why)) => (NOT_EXECUTABLE, why),
        Err(Failure::NotFound(why)) => (NOT_FOUND, why),
        Err(Failure::Unread) => child::die_by(Signal::PIPE.as_raw()),
    };
    print::note(&format!("uhmm: {why}"));
    std::process::exit(code)
}
