//! The names of devices: `mem:1GiB`, `mem:1GiB?type=coherent&node=1`, `file:/path?size=64GiB`, `file:`.
//!
//! What     [`DeviceUrl`], parsed and printed; what is printed parses to the same URL.
//! Why      people type these, so that every refusal says what was wrong with which value and what to
//!          write instead.
//! Fails    with [`UrlError`]; never panics, whatever the text. Nothing is looked up: whether the file
//!          exists shows when it is opened.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use uhmm_addr::{ByteSize, PAGE_SIZE, ParseSizeError};

/// A device, by name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum DeviceUrl {
    /// `mem:1GiB`: memory of this machine.
    Memory {
        /// How much.
        size: ByteSize,
    },
    /// `mem:1GiB?type=coherent`: memory that the program has mapped in place, of memory node 1 with `&node=1`.
    Coherent {
        /// How much.
        size: ByteSize,
        /// Of which memory node; `None` for any.
        node: Option<u32>,
    },
    /// `file:/path?size=64GiB`: a regular file or a block device. `file:` alone: an unlinked temporary file.
    File {
        /// Which file; `None` for a temporary one.
        path: Option<PathBuf>,
        /// How large; `None` for what the file has, or what a temporary one may have.
        size: Option<ByteSize>,
    },
}

/// Why a text names no device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// Nothing there.
    #[error("the device is empty; write mem:1GiB, file:/path?size=64GiB, or file: for a temporary file")]
    Empty,
    /// No colon.
    #[error("{0:?} does not say what kind of device it is; write mem:1GiB or file:/path?size=64GiB")]
    NoScheme(String),
    /// A scheme that never was.
    #[error("{0:?} is no kind of device; the known ones are mem: and file:")]
    UnknownScheme(String),
    /// A scheme that is planned.
    #[error("{0}: is not available in this version; the known ones are mem: and file:")]
    SchemeNotYet(String),
    /// Layers are planned.
    #[error("?layers={0} is not available in this version; leave it out")]
    LayersNotYet(String),
    /// A `?` or `&` with nothing behind it.
    #[error("there is nothing behind the {0:?} in the device; leave it out, or write ?size=64GiB")]
    EmptyQuery(char),
    /// A query key that never was.
    #[error(
        "{0:?} is no option of a device; the known ones are size=64GiB and, of mem:, type=coherent and node=0"
    )]
    UnknownKey(String),
    /// An option of `mem:` with `file:`.
    #[error("{0}= is an option of mem: and not of file:; leave it out")]
    MemoryOnly(&'static str),
    /// An option is given twice.
    #[error("{key}= is given twice, the second time as {value:?}; give it once")]
    Repeated {
        /// Which.
        key: &'static str,
        /// What was written the second time.
        value: String,
    },
    /// A type that never was.
    #[error("{0:?} is no type of memory; write type=coherent, or type=private, which is meant without it")]
    Type(String),
    /// A node that is no number.
    #[error("{0:?} is no memory node; write its number, such as node=0")]
    Node(String),
    /// A node, and memory that is not coherent.
    #[error("node={0} needs type=coherent beside it")]
    NodeOfPrivate(u32),
    /// The size is given twice.
    #[error("the size is given twice, the second time as {0:?}; give it once")]
    RepeatedSize(String),
    /// `mem:` without a size.
    #[error("mem: needs a size; write mem:1GiB")]
    SizeNeeded,
    /// The size does not parse.
    #[error("the size {value:?} cannot be read: {reason}")]
    Size {
        /// What was written.
        value: String,
        /// What is wrong with it.
        reason: ParseSizeError,
    },
    /// The size is zero.
    #[error("the size {0:?} is zero; a device has at least one page, 4096 bytes")]
    SizeZero(String),
    /// The size is not a number of whole pages.
    #[error("the size {value:?} is {bytes} bytes, not a multiple of 4096; write {below} or {above}",
        below = bytes - bytes % PAGE, above = bytes - bytes % PAGE + PAGE)]
    SizeNotPages {
        /// What was written.
        value: String,
        /// What it means.
        bytes: u64,
    },
    /// The size is beyond what page frame numbers reach.
    #[error("the size {0:?} is more than 1048576T, the most a device can have")]
    SizeTooLarge(String),
    /// `file://host/path`.
    #[error("{0:?} names a host; files are local: write file:/path or file:///path")]
    Host(String),
    /// A `%` without two hexadecimal digits.
    #[error("the % in {0:?} is not followed by two hexadecimal digits; write a % itself as %25")]
    Percent(String),
    /// A path with a zero byte.
    #[error("the path {0:?} has a zero byte, which no file name can have")]
    ZeroByte(String),
}

const PAGE: u64 = PAGE_SIZE as u64;
/// Page frame numbers have 48 bits.
const LARGEST: u64 = 1 << 60;
const NOT_YET: [&str; 5] = ["redis", "rediss", "s3", "gpu", "tcp"];

impl DeviceUrl {
    /// Parses `text`; `mem:` without a size has `memory_size`, or is refused when that is `None`.
    pub fn parse(text: &str, memory_size: Option<ByteSize>) -> Result<Self, UrlError> {
        if text.is_empty() {
            return Err(UrlError::Empty);
        }
        let (scheme, rest) = text.split_once(':').ok_or_else(|| UrlError::NoScheme(text.into()))?;
        match scheme {
            "mem" => Self::memory(rest, memory_size),
            "file" => Self::file(rest),
            _ if NOT_YET.contains(&scheme) => Err(UrlError::SchemeNotYet(scheme.into())),
            _ => Err(UrlError::UnknownScheme(scheme.into())),
        }
    }

    fn memory(rest: &str, default: Option<ByteSize>) -> Result<Self, UrlError> {
        let (body, query) = split_query(rest)?;
        let asked = Options::of(query)?;
        let size = match (body, asked.size) {
            ("", asked) => asked.map(|(_, size)| size).or(default).ok_or(UrlError::SizeNeeded)?,
            (body, None) => parse_size(body)?,
            (_, Some((again, _))) => return Err(UrlError::RepeatedSize(again.into())),
        };
        match (asked.coherent, asked.node) {
            (Some(true), node) => Ok(Self::Coherent { size, node }),
            (_, Some(node)) => Err(UrlError::NodeOfPrivate(node)),
            (_, None) => Ok(Self::Memory { size }),
        }
    }

    fn file(rest: &str) -> Result<Self, UrlError> {
        let (body, query) = split_query(rest)?;
        let asked = Options::of(query)?;
        let foreign = asked.coherent.map(|_| "type").or(asked.node.map(|_| "node"));
        if let Some(key) = foreign {
            return Err(UrlError::MemoryOnly(key));
        }
        let size = asked.size.map(|(_, size)| size);
        if body.starts_with("//") && !body.starts_with("///") {
            return Err(UrlError::Host(body.into()));
        }
        let mut path = decode(body)?;
        if path.contains(&0) {
            return Err(UrlError::ZeroByte(body.into()));
        }
        let leading = path.iter().take_while(|byte| **byte == b'/').count();
        path.drain(..leading.saturating_sub(1));
        let path = (!path.is_empty()).then(|| PathBuf::from(OsString::from_vec(path)));
        Ok(Self::File { path, size })
    }
}

impl FromStr for DeviceUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        Self::parse(text, None)
    }
}

impl fmt::Display for DeviceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { size } => write!(f, "mem:{}", Exact(*size)),
            Self::Coherent { size, node } => {
                write!(f, "mem:{}?type=coherent", Exact(*size))?;
                node.map_or(Ok(()), |node| write!(f, "&node={node}"))
            }
            Self::File { path, size } => {
                f.write_str("file:")?;
                if let Some(path) = path {
                    encode(path.as_os_str(), f)?;
                }
                match size {
                    Some(size) => write!(f, "?size={}", Exact(*size)),
                    None => Ok(()),
                }
            }
        }
    }
}

/// A size in the largest unit that divides it.
struct Exact(ByteSize);

impl fmt::Display for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.bytes();
        for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if bytes != 0 && bytes.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", bytes >> shift);
            }
        }
        write!(f, "{bytes}")
    }
}

fn split_query(rest: &str) -> Result<(&str, Option<&str>), UrlError> {
    match rest.split_once('?') {
        None => Ok((rest, None)),
        Some((_, "")) => Err(UrlError::EmptyQuery('?')),
        Some((body, query)) => Ok((body, Some(query))),
    }
}

/// What a query asks for.
#[derive(Default)]
struct Options<'a> {
    /// The size, as written and as meant.
    size: Option<(&'a str, ByteSize)>,
    coherent: Option<bool>,
    node: Option<u32>,
}

impl<'a> Options<'a> {
    fn of(query: Option<&'a str>) -> Result<Self, UrlError> {
        let mut found = Self::default();
        for pair in query.into_iter().flat_map(|query| query.split('&')) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let again = |key| Err(UrlError::Repeated { key, value: value.into() });
            match key {
                "size" if found.size.is_some() => return Err(UrlError::RepeatedSize(value.into())),
                "size" => found.size = Some((value, parse_size(value)?)),
                "type" if found.coherent.is_some() => return again("type"),
                "type" => found.coherent = Some(parse_type(value)?),
                "node" if found.node.is_some() => return again("node"),
                "node" => found.node = Some(value.parse().map_err(|_| UrlError::Node(value.into()))?),
                "layers" => return Err(UrlError::LayersNotYet(value.into())),
                "" => return Err(UrlError::EmptyQuery('&')),
                _ => return Err(UrlError::UnknownKey(key.into())),
            }
        }
        Ok(found)
    }
}

/// Whether memory of this type is coherent.
fn parse_type(value: &str) -> Result<bool, UrlError> {
    match value {
        "coherent" => Ok(true),
        "private" => Ok(false),
        _ => Err(UrlError::Type(value.into())),
    }
}

fn parse_size(value: &str) -> Result<ByteSize, UrlError> {
    let size: ByteSize = value.parse().map_err(|reason| UrlError::Size { value: value.into(), reason })?;
    match size.bytes() {
        0 => Err(UrlError::SizeZero(value.into())),
        bytes if bytes > LARGEST => Err(UrlError::SizeTooLarge(value.into())),
        bytes if bytes % PAGE != 0 => Err(UrlError::SizeNotPages { value: value.into(), bytes }),
        _ => Ok(size),
    }
}

fn decode(text: &str) -> Result<Vec<u8>, UrlError> {
    let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
    let mut path = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            path.push(byte);
            continue;
        }
        match (digit(bytes.next()), digit(bytes.next())) {
            (Some(high), Some(low)) => path.push((high * 16 + low) as u8),
            _ => return Err(UrlError::Percent(text.into())),
        }
    }
    Ok(path)
}

fn encode(path: &OsStr, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for &byte in path.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => write!(f, "{}", char::from(byte))?,
            _ if b"/._-~+,:=@&".contains(&byte) => write!(f, "{}", char::from(byte))?,
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}
