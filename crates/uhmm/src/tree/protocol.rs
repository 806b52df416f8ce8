//! What a process tree and its keeper say to each other.
//!
//! What     [`Request`]s of agents and of the front process, [`Reply`]s of the keeper, and the layout of the
//!          files that travel with them. One message is one packet of at most [`MAX_MESSAGE`] bytes.
//! Why      agents sit in programs that can be killed between any two instructions, and whoever connects may
//!          be anybody: every message has a fixed form, carries its version and is checked in full.
//! Owns     nothing. Encoding and decoding allocate nothing and never panic, whatever the bytes.
//! Fails    with a [`ProtocolError`].
//!
//! ```text
//! agent            keeper
//! Hello      -->            cookie 0: a fresh process; else the child of the fork with that cookie
//!            <--  Welcome   with the files DEVICE, DESCRIPTORS, STATS, TABLE and, for a child, UFFD
//!       or   <--  Refused   the agent ends its process, unless its pages are looked after
//!                           ([`Refusal::is_looked_after`])
//! Child      -->            with the files CHILD_UFFD, CHILD_TABLE; from now on the keeper serves the child
//! Goodbye    -->            why the process is about to die, if it knows
//! front
//! Report     -->
//!            <--  Totals    (`super::shared::Totals`)
//! ```

use uhmm_addr::{ByteSize, CHUNK_PAGES, PAGE_SHIFT, PageCount, Pfn};
use uhmm_devices::Backing;
use uhmm_sys::uffd::Features;

/// Of this description. Both ends come from one build, so that there is nothing to negotiate.
pub const VERSION: u16 = 1;
/// The longest message.
pub const MAX_MESSAGE: usize = 2048;
/// The environment variable that holds the name of the keeper's socket.
pub const ENV_SOCKET: &str = "UHMM_RUN";
/// What the names of keepers' sockets begin with.
pub const SOCKET_PREFIX: &str = "uhmm-run-";

/// Words in a page table: one for every page of 47 bits of addresses, from page 0 on.
pub const TABLE_PAGES: PageCount = PageCount::new(1 << (47 - PAGE_SHIFT));
/// Bytes of words at the start of a table's file.
pub const TABLE_WORD_BYTES: u64 = TABLE_PAGES.get() as u64 * 8;
/// Where in a table's file the bits for used chunks begin (see `uhmm_core::pagetable::PageTable::over`).
pub const TABLE_USED_OFFSET: u64 = TABLE_WORD_BYTES;
/// Bytes of those bits.
pub const TABLE_USED_BYTES: u64 = (TABLE_PAGES.get() / CHUNK_PAGES / 8) as u64;
/// The size of a table's file, nearly all of it a hole.
pub const TABLE_FILE_BYTES: u64 = TABLE_WORD_BYTES + TABLE_USED_BYTES;
/// The first page frame number of the tree's device.
pub const FIRST_PFN: Pfn = Pfn::new(1 << 20);

/// With [`Reply::Welcome`]: the memory or the file that the device is made from.
pub const FD_DEVICE: usize = 0;
/// With [`Reply::Welcome`]: the device's descriptors (`uhmm_core::pagemap::DescriptorMemory`).
pub const FD_DESCRIPTORS: usize = 1;
/// With [`Reply::Welcome`]: the statistics of the whole tree (`super::shared::ProcessBlock`).
pub const FD_STATS: usize = 2;
/// With [`Reply::Welcome`]: the page table of this process, [`TABLE_FILE_BYTES`] long.
pub const FD_TABLE: usize = 3;
/// With [`Reply::Welcome`] for a child: the userfaultfd that watches it.
pub const FD_UFFD: usize = 4;
/// With [`Request::Child`]: the userfaultfd that watches the child.
pub const FD_CHILD_UFFD: usize = 0;
/// With [`Request::Child`]: the page table of the child, complete, with a reference for each pfn in it.
pub const FD_CHILD_TABLE: usize = 1;

const MAGIC: u32 = u32::from_le_bytes(*b"uhmm");
pub(super) const HEADER: usize = 8;

/// Room for one message.
pub type Buffer = [u8; MAX_MESSAGE];

/// An empty buffer.
pub const fn buffer() -> Buffer {
    [0; MAX_MESSAGE]
}

/// Why bytes are no message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// It does not begin as messages do.
    #[error("the message begins with {0:#010x} and is none of uhmm's")]
    Magic(u32),
    /// It is of another version of uhmm.
    #[error("the message has version {0}, this uhmm speaks version {VERSION}; use one uhmm throughout")]
    Version(u16),
    /// There is no message of this kind in this direction.
    #[error("there is no message of kind {0}")]
    Kind(u16),
    /// It is too short or too long for its kind.
    #[error("a message of kind {kind} with {bytes} bytes")]
    Length {
        /// Which kind.
        kind: u16,
        /// How long it was.
        bytes: usize,
    },
    /// A field holds a value that means nothing.
    #[error("the field {field} of a message holds {value}")]
    Value {
        /// Which field.
        field: &'static str,
        /// What it held.
        value: u64,
    },
}

/// What agents, and the front process, say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// A process presents itself.
    Hello {
        /// Its number, as it sees itself.
        pid: u32,
        /// 0 for a fresh process, else the number of the fork whose child it is.
        cookie: u64,
    },
    /// The sender has forked; two files come along.
    Child {
        /// The number of the fork, by which the child will present itself; never 0.
        cookie: u64,
        /// What the child's userfaultfd can do.
        features: Features,
    },
    /// The sender is about to end its process.
    Goodbye(Farewell),
    /// What happened so far, in the whole tree?
    Report,
}

/// Why a process ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Farewell {
    /// It has nothing more to do.
    Exit = 0,
    /// Its memory fits neither the budget nor the device; it gets what a program without memory gets.
    DeviceFull = 1,
    /// The system has no memory.
    OutOfMemory = 2,
    /// uhmm has failed in it.
    Failed = 3,
}

/// What the keeper answers to [`Request::Hello`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    /// Come in; files come along.
    Welcome(Welcome),
    /// Nothing can be done for this process; its pages are lost to it.
    Refused(Refusal),
}

/// What a process must know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Welcome {
    /// How much it may have in RAM.
    pub budget: ByteSize,
    /// Act as if the kernel could not move frames.
    pub force_fallback: bool,
    /// Keep device pages that are still equal to pages in RAM.
    pub track: bool,
    /// The process is a forked child, and its userfaultfd comes along.
    pub child: bool,
    /// What that can do; nothing for a fresh process.
    pub features: Features,
    /// What the file of the device is.
    pub backing: Backing,
    /// Its size.
    pub device_size: ByteSize,
    /// Whether the file is accessed past the page cache; a property of the open file, told for the record.
    pub direct: bool,
    /// The number of this process's block in the file of statistics.
    pub block: u32,
}

impl Welcome {
    /// Pages of the device.
    pub const fn device_pages(&self) -> PageCount {
        self.device_size.pages()
    }

    /// Where this process's block of statistics begins in their file.
    pub const fn block_offset(&self) -> u64 {
        self.block as u64 * super::shared::BLOCK_BYTES
    }
}

/// Why the keeper refuses a process.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[repr(u64)]
pub enum Refusal {
    /// No parent has announced a child with that number.
    #[error("nobody has announced this child: its parent died while it forked")]
    UnknownChild = 0,
    /// More processes than there is room for.
    #[error("there are more processes under this uhmm run than it has room for")]
    TooMany = 1,
    /// The message was of another version.
    #[error("the agent and the keeper are of different versions; use one uhmm throughout")]
    Version = 2,
    /// The keeper lacks memory or descriptors.
    #[error("the keeper of this uhmm run has no memory or no descriptors left")]
    Exhausted = 3,
    /// The process is another user's.
    #[error("it runs as another user than this uhmm run")]
    Foreign = 4,
}

impl Refusal {
    /// Whether a refused child, whose parent has announced it, has nothing to fear: the keeper serves it until all of
    /// its pages are at home.
    pub const fn is_looked_after(self) -> bool {
        matches!(self, Self::TooMany | Self::Exhausted | Self::Foreign)
    }
}

const HELLO: u16 = 1;
const CHILD: u16 = 2;
const GOODBYE: u16 = 3;
const REPORT: u16 = 4;
const WELCOME: u16 = 16;
const REFUSED: u16 = 17;
pub(super) const TOTALS: u16 = 18;

const FALLBACK: u64 = 1;
const TRACK: u64 = 1 << 1;
const IS_CHILD: u64 = 1 << 2;
const DIRECT: u64 = 1 << 3;
const FLAGS: u64 = FALLBACK | TRACK | IS_CHILD | DIRECT;

impl Request {
    /// The message's bytes, in `buffer`.
    pub fn encode<'b>(&self, buffer: &'b mut Buffer) -> &'b [u8] {
        match *self {
            Self::Hello { pid, cookie } => encode(HELLO, &[u64::from(pid), cookie], buffer),
            Self::Child { cookie, features } => encode(CHILD, &[cookie, features.bits()], buffer),
            Self::Goodbye(why) => encode(GOODBYE, &[why as u64], buffer),
            Self::Report => encode(REPORT, &[], buffer),
        }
    }

    /// The message that `bytes` are.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        match kind_of(bytes)? {
            HELLO => {
                let [pid, cookie] = words(bytes)?;
                Ok(Self::Hello { pid: narrow("pid", pid)?, cookie })
            }
            CHILD => match words(bytes)? {
                [0, _] => Err(ProtocolError::Value { field: "cookie", value: 0 }),
                [cookie, features] => Ok(Self::Child { cookie, features: Features::from_bits(features) }),
            },
            GOODBYE => match words(bytes)? {
                [0] => Ok(Self::Goodbye(Farewell::Exit)),
                [1] => Ok(Self::Goodbye(Farewell::DeviceFull)),
                [2] => Ok(Self::Goodbye(Farewell::OutOfMemory)),
                [3] => Ok(Self::Goodbye(Farewell::Failed)),
                [value] => Err(ProtocolError::Value { field: "reason", value }),
            },
            REPORT => words::<0>(bytes).map(|_| Self::Report),
            kind => Err(ProtocolError::Kind(kind)),
        }
    }
}

impl Reply {
    /// The message's bytes, in `buffer`.
    pub fn encode<'b>(&self, buffer: &'b mut Buffer) -> &'b [u8] {
        match self {
            Self::Welcome(welcome) => {
                let flag = |set, bit| if set { bit } else { 0 };
                let flags = flag(welcome.force_fallback, FALLBACK)
                    | flag(welcome.track, TRACK)
                    | flag(welcome.child, IS_CHILD)
                    | flag(welcome.direct, DIRECT);
                let backing = match welcome.backing {
                    Backing::Memory => 0,
                    Backing::File => 1,
                };
                let fields = [
                    welcome.budget.bytes(),
                    flags,
                    welcome.features.bits(),
                    backing,
                    welcome.device_size.bytes(),
                    u64::from(welcome.block),
                ];
                encode(WELCOME, &fields, buffer)
            }
            Self::Refused(why) => encode(REFUSED, &[*why as u64], buffer),
        }
    }

    /// The message that `bytes` are.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProtocolError> {
        match kind_of(bytes)? {
            WELCOME => {
                let [budget, flags, features, backing, device_size, block] = words(bytes)?;
                if flags & !FLAGS != 0 {
                    return Err(ProtocolError::Value { field: "flags", value: flags });
                }
                let backing = match backing {
                    0 => Backing::Memory,
                    1 => Backing::File,
                    value => return Err(ProtocolError::Value { field: "backing", value }),
                };
                Ok(Self::Welcome(Welcome {
                    budget: ByteSize::new(budget),
                    force_fallback: flags & FALLBACK != 0,
                    track: flags & TRACK != 0,
                    child: flags & IS_CHILD != 0,
                    features: Features::from_bits(features),
                    backing,
                    device_size: ByteSize::new(device_size),
                    direct: flags & DIRECT != 0,
                    block: narrow("block", block)?,
                }))
            }
            REFUSED => match words(bytes)? {
                [0] => Ok(Self::Refused(Refusal::UnknownChild)),
                [1] => Ok(Self::Refused(Refusal::TooMany)),
                [2] => Ok(Self::Refused(Refusal::Version)),
                [3] => Ok(Self::Refused(Refusal::Exhausted)),
                [4] => Ok(Self::Refused(Refusal::Foreign)),
                [value] => Err(ProtocolError::Value { field: "reason", value }),
            },
            kind => Err(ProtocolError::Kind(kind)),
        }
    }
}

/// A header and words, little-endian. More words than fit do not exist.
pub(super) fn encode<'b>(kind: u16, fields: &[u64], buffer: &'b mut Buffer) -> &'b [u8] {
    const { assert!(HEADER + super::shared::Totals::WORDS * 8 <= MAX_MESSAGE) };
    let fields = &fields[..fields.len().min((MAX_MESSAGE - HEADER) / 8)];
    buffer[..4].copy_from_slice(&MAGIC.to_le_bytes());
    buffer[4..6].copy_from_slice(&VERSION.to_le_bytes());
    buffer[6..8].copy_from_slice(&kind.to_le_bytes());
    for (place, field) in buffer[HEADER..].chunks_exact_mut(8).zip(fields) {
        place.copy_from_slice(&field.to_le_bytes());
    }
    &buffer[..HEADER + fields.len() * 8]
}

/// The kind of a message with a good header.
pub(super) fn kind_of(bytes: &[u8]) -> Result<u16, ProtocolError> {
    let Some((&[a, b, c, d, e, f, g, h], _)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(ProtocolError::Length { kind: 0, bytes: bytes.len() });
    };
    let magic = u32::from_le_bytes([a, b, c, d]);
    if magic != MAGIC {
        return Err(ProtocolError::Magic(magic));
    }
    let version = u16::from_le_bytes([e, f]);
    if version != VERSION {
        return Err(ProtocolError::Version(version));
    }
    Ok(u16::from_le_bytes([g, h]))
}

/// Exactly `N` words behind the header.
pub(super) fn words<const N: usize>(bytes: &[u8]) -> Result<[u64; N], ProtocolError> {
    let body = bytes.get(HEADER..).unwrap_or(&[]);
    if body.len() != N * 8 {
        return Err(ProtocolError::Length { kind: kind_of(bytes)?, bytes: bytes.len() });
    }
    let mut words = [0; N];
    for (word, place) in words.iter_mut().zip(body.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*place);
    }
    Ok(words)
}

fn narrow(field: &'static str, value: u64) -> Result<u32, ProtocolError> {
    u32::try_from(value).map_err(|_| ProtocolError::Value { field, value })
}

#[cfg(test)]
mod tests;
