//! What a scenario is made of.
//!
//! What    [`Operation`], and the [`Pages`] that it is about. Its text is what stands in the output before the result.
//! Source  the kernel's `lib/test_hmm_uapi.h`, and what a program does to its memory meanwhile.

use std::fmt;

/// Pages of the window in which everything happens.
pub(crate) const WINDOW: u64 = 16;

/// Some pages of the window, by number; the last ones may lie behind its end, where nothing is ever mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pages {
    pub(crate) first: u64,
    pub(crate) count: u64,
}

/// What is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Private and anonymous.
    Anonymous(Protection),
    /// Shared and anonymous.
    Shared,
    /// A file in memory, shared.
    File,
}

/// What may be done with memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Protection {
    None,
    Read,
    Write,
}

/// A request to a device about pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Request {
    Read,
    Write,
    Migrate,
    Back,
    Snapshot,
    Exclusive,
    CheckExclusive,
    Release,
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    Map(Kind, Pages),
    Unmap(Pages),
    Protect(Protection, Pages),
    /// `MADV_DONTNEED`.
    Discard(Pages),
    /// The program reads every byte.
    Read(Pages),
    /// The program writes some words of each page.
    Write(Pages),
    /// A device, by number, is asked; its buffer may be nowhere. A private one that is to read or write is asked to move
    /// the pages home before: the kernel's, where it has pages and its table does not say so, follows a pointer to
    /// nothing (`dmirror_do_fault` takes the device's page for the memory behind it).
    Device {
        request: Request,
        device: u64,
        pages: Pages,
        nowhere: bool,
    },
    /// Pages are brought home from everywhere and migrated to a device; if all of them are there, and may be written
    /// where it is to write, the device reads or writes them.
    Use {
        write: bool,
        device: u64,
        pages: Pages,
    },
    /// A device is closed and opened again.
    Reopen(u64),
    /// The program forks; the child waits to be told what to do.
    Fork,
    ChildRead(Pages),
    ChildWrite(Pages),
    ChildExit,
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.first, self.count)
    }
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous(protection) => write!(f, "anon-{protection}"),
            Self::Shared => f.write_str("shared"),
            Self::File => f.write_str("file"),
        }
    }
}

impl Operation {
    /// Which pages it is about, if any.
    pub(crate) const fn pages(&self) -> Option<Pages> {
        match self {
            Self::Map(_, pages)
            | Self::Unmap(pages)
            | Self::Protect(_, pages)
            | Self::Discard(pages)
            | Self::Read(pages)
            | Self::Write(pages)
            | Self::Device { pages, .. }
            | Self::Use { pages, .. }
            | Self::ChildRead(pages)
            | Self::ChildWrite(pages) => Some(*pages),
            Self::Reopen(_) | Self::Fork | Self::ChildExit => None,
        }
    }
}

impl Request {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "dev-read",
            Self::Write => "dev-write",
            Self::Migrate => "migrate",
            Self::Back => "back",
            Self::Snapshot => "snapshot",
            Self::Exclusive => "exclusive",
            Self::CheckExclusive => "check-exclusive",
            Self::Release => "release",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(kind, pages) => write!(f, "map {pages} {kind}"),
            Self::Unmap(pages) => write!(f, "unmap {pages}"),
            Self::Protect(protection, pages) => write!(f, "protect {pages} {protection}"),
            Self::Discard(pages) => write!(f, "discard {pages}"),
            Self::Read(pages) => write!(f, "read {pages}"),
            Self::Write(pages) => write!(f, "write {pages}"),
            Self::Device { request, device, pages, nowhere } => {
                let nowhere = if *nowhere { " nowhere" } else { "" };
                write!(f, "{} {pages} dev{device}{nowhere}", request.name())
            }
            Self::Use { write, device, pages } => {
                write!(f, "use-{} {pages} dev{device}", if *write { "write" } else { "read" })
            }
            Self::Reopen(device) => write!(f, "reopen dev{device}"),
            Self::Fork => f.write_str("fork"),
            Self::ChildRead(pages) => write!(f, "child-read {pages}"),
            Self::ChildWrite(pages) => write!(f, "child-write {pages}"),
            Self::ChildExit => f.write_str("child-exit"),
        }
    }
}
