//! The mappings of this process, from `/proc/self/maps`.
//!
//! What     [`MapsReader::for_each`] hands out each mapping; [`parse_line`] reads one line.
//! Why      the one list of mappings that needs no privilege. It is read often, by a thread that should not
//!          disturb what it looks at: so the buffer is kept, and nothing is allocated for a line.
//! Owns     a descriptor and a buffer, which grows when a line (a path) is longer than it.
//! Fails    with the error of the read. A line that makes no sense is left out. The list is not a
//!          snapshot: mappings that change between two reads may be seen twice or not at all.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uhmm_addr::{VaRange, VirtAddr};

#[cfg(test)]
mod tests;

/// One mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapEntry<'a> {
    /// Its addresses.
    pub range: VaRange,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub exec: bool,
    /// Shared, not private.
    pub shared: bool,
    /// The file's number; zero for anonymous memory.
    pub inode: u64,
    /// The file's path or the mapping's name (`[heap]`, `[anon:name]`), as the kernel writes it: a line
    /// feed is `\012`. Empty if it has none.
    pub path: &'a [u8],
}

/// Reads one line, without its line feed:
/// `7f8a1000-7f8a2000 rw-p 00000000 00:00 0    [heap]`.
pub fn parse_line(line: &[u8]) -> Option<MapEntry<'_>> {
    let (start, rest) = number(line, 16)?;
    let (end, rest) = number(after(rest, b'-')?, 16)?;
    let rest = after(rest, b' ')?;
    let (flags, rest) = rest.split_at_checked(4)?;
    let (_offset, rest) = number(after(rest, b' ')?, 16)?;
    let (_major, rest) = number(after(rest, b' ')?, 16)?;
    let (_minor, rest) = number(after(rest, b':')?, 16)?;
    let (inode, rest) = number(after(rest, b' ')?, 10)?;
    let start = usize::try_from(start).ok()?;
    let bytes = usize::try_from(end).ok()?.checked_sub(start)?;
    let flag = |index: usize, letter: u8| match flags[index] {
        found if found == letter => Some(true),
        b'-' => Some(false),
        _ => None,
    };
    Some(MapEntry {
        range: VaRange::new(VirtAddr::new(start), bytes).ok()?,
        read: flag(0, b'r')?,
        write: flag(1, b'w')?,
        exec: flag(2, b'x')?,
        shared: match flags[3] {
            b's' => true,
            b'p' => false,
            _ => return None,
        },
        inode,
        // The kernel pads with blanks in front of a name; a name may begin with none.
        path: rest.trim_ascii_start(),
    })
}

/// The text behind `byte`, which must come first.
fn after(text: &[u8], byte: u8) -> Option<&[u8]> {
    text.strip_prefix(&[byte])
}

/// A number at the front, at least one digit, and what follows it.
fn number(text: &[u8], radix: u32) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    let mut digits = 0;
    for &byte in text {
        let Some(digit) = char::from(byte).to_digit(radix) else {
            break;
        };
        value = value.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))?;
        digits += 1;
    }
    if digits == 0 { None } else { Some((value, &text[digits..])) }
}

/// Reads the list again and again, with one buffer.
#[derive(Debug)]
pub struct MapsReader {
    file: OwnedFd,
    buffer: Vec<u8>,
}

/// The buffer's first size; holds about 150 mappings.
const BUFFER: usize = 16 << 10;

impl MapsReader {
    /// Opens the list of this process.
    pub fn open() -> io::Result<Self> {
        Self::with_buffer(BUFFER)
    }

    fn with_buffer(bytes: usize) -> io::Result<Self> {
        let file =
            rustix::fs::open("/proc/thread-self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { file, buffer: vec![0; bytes] })
    }

    /// Reads the whole list and calls `f` for each mapping, in the order of addresses.
    pub fn for_each(&mut self, mut f: impl FnMut(MapEntry<'_>)) -> io::Result<()> {
        let mut offset = 0;
        let mut filled = 0;
        loop {
            let got = match rustix::io::pread(&self.file, &mut self.buffer[filled..], offset) {
                Ok(got) => got,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            offset += got as u64;
            filled += got;
            let mut rest = &self.buffer[..filled];
            while let Some(at) = rest.iter().position(|&byte| byte == b'\n') {
                if let Some(entry) = parse_line(&rest[..at]) {
                    f(entry);
                }
                rest = &rest[at + 1..];
            }
            let left = rest.len();
            if got == 0 {
                if let Some(entry) = parse_line(rest) {
                    f(entry);
                }
                return Ok(());
            }
            // The line that the buffer cut goes to the front, and the next read completes it.
            self.buffer.copy_within(filled - left..filled, 0);
            filled = left;
            if filled == self.buffer.len() {
                let longer = self.buffer.len() * 2;
                self.buffer.resize(longer, 0);
            }
        }
    }
}
