//! Namespaces: what a store's space is divided into.
//!
//! What     [`Namespace`], its [`NamespaceId`], its [`Mode`] and [`Uuid`]; and where its bytes lie.
//! Why      one store serves several purposes, each with an alignment of its own.
//! Source   `drivers/dax/bus.c` (`dev_dax`, `ranges`, `dax_pgoff_to_phys`), `ndctl`'s namespaces.

use core::fmt;
use core::str::FromStr;

use uhmm_addr::{ByteSize, Geometry, PAGE_SIZE, PageCount};

use super::Extent;

/// Number of a namespace in its store: the `Y` of `daxX.Y`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub u32);

impl fmt::Debug for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "namespace {}", self.0)
    }
}

/// What a namespace is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Mode {
    /// Mapped as a whole, at exactly its alignment.
    #[default]
    DevDax,
    /// Holds files.
    FsDax,
    /// Handed to a space as memory.
    SystemRam,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::DevDax, Self::FsDax, Self::SystemRam];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DevDax => "devdax",
            Self::FsDax => "fsdax",
            Self::SystemRam => "system-ram",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// There is no such mode.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no mode; the modes are devdax, fsdax and system-ram")]
pub struct ParseModeError(String);

impl FromStr for Mode {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Self, ParseModeError> {
        Self::ALL.into_iter().find(|mode| mode.name() == text).ok_or_else(|| ParseModeError(text.into()))
    }
}

/// 128 random bits that are nobody else's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// A new one (version 4 of RFC 9562).
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        uhmm_sys::random::fill(&mut bytes)?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            let dash = if matches!(n, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A part of a store.
///
/// Its extents are disjoint, inside the store, and begin and end at multiples of the alignment; its bytes are
/// theirs, one extent after the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Namespace {
    /// Its number.
    pub id: NamespaceId,
    /// Its own mark, for life.
    pub uuid: Uuid,
    /// What it is called, for people; may be empty. At most [`Namespace::NAME_MAX`] bytes.
    pub name: String,
    /// What it is for.
    pub mode: Mode,
    /// The size of its compound pages: of what is mapped, faulted and poisoned at a time.
    pub align: Geometry,
    /// Where it lies; none while it has no size.
    pub extents: Vec<Extent>,
}

/// Some of a namespace's pages, which lie together in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The first page, counted from the namespace's first.
    pub page: u64,
    /// Where they are in the store.
    pub extent: Extent,
}

impl Namespace {
    /// The longest name, in bytes.
    pub const NAME_MAX: usize = 63;

    /// Its pages.
    pub fn pages(&self) -> PageCount {
        PageCount::new(self.extents.iter().map(|extent| extent.len as usize).sum())
    }

    /// Its size.
    pub fn size(&self) -> ByteSize {
        self.pages().size()
    }

    /// The extents with the pages at which they begin.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.extents.iter().scan(0, |page, extent| {
            let piece = Piece { page: *page, extent: *extent };
            *page += extent.len;
            Some(piece)
        })
    }

    /// Where `len` pages from `page` on lie, in order (the kernel's `dax_pgoff_to_phys`). What is behind the
    /// namespace's end is left out.
    pub fn locate(&self, page: u64, len: u64) -> impl Iterator<Item = Piece> {
        let wanted = Extent { start: page, len };
        self.pieces().filter_map(move |piece| {
            let own = Extent { start: piece.page, len: piece.extent.len };
            let part = own.intersect(wanted)?;
            let start = piece.extent.start + (part.start - piece.page);
            Some(Piece { page: part.start, extent: Extent { start, len: part.len } })
        })
    }

    /// Which of its pages the store's `pages` are.
    pub fn own(&self, pages: Extent) -> impl Iterator<Item = Extent> {
        self.pieces().filter_map(move |piece| {
            let part = piece.extent.intersect(pages)?;
            Some(Extent { start: piece.page + (part.start - piece.extent.start), len: part.len })
        })
    }
}

/// Bytes as whole pages, if they are.
pub(crate) fn whole_pages(bytes: u64) -> Option<u64> {
    bytes.is_multiple_of(PAGE_SIZE as u64).then_some(bytes / PAGE_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_people_know_it() {
        let uuid = Uuid(core::array::from_fn(|n| n as u8 * 17));
        assert_eq!(uuid.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
        let (one, two) = (Uuid::random().unwrap(), Uuid::random().unwrap());
        assert_ne!(one, two);
        assert_eq!(one.to_string().as_bytes()[14], b'4');
    }

    #[test]
    fn pages_are_found_in_both_directions() {
        let extents = vec![Extent { start: 10, len: 2 }, Extent { start: 4, len: 3 }];
        let namespace = Namespace {
            id: NamespaceId(0),
            uuid: Uuid([0; 16]),
            name: String::new(),
            mode: Mode::DevDax,
            align: Geometry::K4,
            extents,
        };
        let found: Vec<Piece> = namespace.locate(1, 3).collect();
        let expected = [(1, 11, 1), (2, 4, 2)];
        let expected = expected.map(|(page, start, len)| Piece { page, extent: Extent { start, len } });
        assert_eq!(found, expected);
        assert_eq!(namespace.locate(5, 9).count(), 0);
        let own: Vec<Extent> = namespace.own(Extent { start: 5, len: 6 }).collect();
        assert_eq!(own, [Extent { start: 0, len: 1 }, Extent { start: 3, len: 2 }]);
    }
}
