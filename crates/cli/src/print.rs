//! What the command says.
//!
//! What     [`line()`], what was asked for, on standard output; [`note`], beside it, on standard error.
//! Why      the macros of the standard library panic where nobody reads (`uhmm doctor | head -1`) or the disk is
//!          full, and then the exit code would be neither ours nor the program's.
//! Fails    [`line()`], with a [`Failure`]. A note is written or not: nobody could be told.

use std::io::{ErrorKind, Write, stderr, stdout};

use crate::exit::Failure;

/// Writes a line to standard output.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    let mut out = stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Failure::Unread),
        written => written.map_err(|error| Failure::Failed(format!("standard output: {error}"))),
    }
}

/// Writes a line to standard error.
pub(crate) fn note(text: &str) {
    // In one piece: others write there as well.
    let _ = stderr().write_all(format!("{text}\n").as_bytes());
}
