//! One copy of the labels, as bytes.
//!
//! What     [`encode`] and [`decode`]. All numbers are little endian:
//!
//! ```text
//!   0  "UHMMDAX" and a zero byte     32  store's uuid, 16 bytes
//!   8  version, u32                  48  capacity in pages, u64
//!  12  length in bytes, u32          56  medium's pages, log2 of 4K pages, u32
//!  16  sequence, u64                 60  namespaces, u32
//!  24  CRC-32 (IEEE), u32            64  runs of bad pages, u32
//!  28  store's number, u32           68  namespaces, then bad runs
//!
//!  namespace: id u32, mode u8, log2 of the alignment u8, length of the name u8, 0, uuid 16 bytes,
//!             extents u32, name, extents
//!  extent, bad run: first page u64, pages u64
//! ```
//!
//! Why      the first 28 bytes are the same in every version, and the checksum covers everything but itself, so
//!          that a label of a newer version is told from one that is broken.
//! Fails    [`LabelFault`]. Nothing is believed before the checksum holds, and then each rule that [`Table`]
//!          promises is checked: the bytes may be of somebody else's making.

use uhmm_addr::Geometry;

use super::extent::gaps;
use super::{BadPages, Extent, Mode, Namespace, NamespaceId, Table, Uuid};

/// The version that is written here.
pub const VERSION: u32 = 1;
/// Bytes of one copy; a label is no longer.
pub const COPY_BYTES: usize = 128 << 10;

const MAGIC: [u8; 8] = *b"UHMMDAX\0";
const CHECKSUM: core::ops::Range<usize> = 24..28;
/// Bytes in front of the namespaces.
const HEADER: usize = 68;

/// What is wrong with one copy of the labels.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LabelFault {
    /// Nothing was ever written there.
    #[error("empty")]
    Blank,
    /// These are no labels.
    #[error("no label: it begins with {0:02x?}")]
    Foreign([u8; 8]),
    /// The checksum does not fit: a write that was torn, or decay.
    #[error("broken: the checksum is {found:#010x} and should be {expected:#010x}")]
    Checksum {
        /// What is written there.
        found: u32,
        /// What the bytes have.
        expected: u32,
    },
    /// Whole, and of a version that is not known here.
    #[error("of version {found}, and this uhmm knows version {VERSION}")]
    Newer {
        /// Its version.
        found: u32,
    },
    /// Whole, and against the rules.
    #[error("against the rules: {0}")]
    Invalid(&'static str),
    /// It cannot be read.
    #[error("unreadable: {0}")]
    Unreadable(std::io::ErrorKind),
}

/// The table does not fit into a label.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the labels would take {bytes} bytes and have room for {COPY_BYTES}; destroy a namespace or clear bad pages"
)]
pub struct TooLong {
    /// Bytes it would take.
    pub bytes: usize,
}

/// A whole label.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Label {
    /// How many labels were written before this one.
    pub sequence: u64,
    /// What it says.
    pub table: Table,
}

/// The label's bytes.
pub fn encode(label: &Label) -> Result<Vec<u8>, TooLong> {
    let table = &label.table;
    let mut bytes = Vec::with_capacity(4096);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(label.sequence.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(table.region.to_le_bytes());
    bytes.extend(table.uuid.0);
    bytes.extend(table.capacity.to_le_bytes());
    for number in [table.page.order(), table.namespaces.len() as u32, table.bad.runs().len() as u32] {
        bytes.extend(number.to_le_bytes());
    }
    for namespace in &table.namespaces {
        bytes.extend(namespace.id.0.to_le_bytes());
        let mode = Mode::ALL.iter().position(|mode| *mode == namespace.mode).unwrap_or(0);
        bytes.extend([mode as u8, namespace.align.order() as u8, namespace.name.len() as u8, 0]);
        bytes.extend(namespace.uuid.0);
        bytes.extend((namespace.extents.len() as u32).to_le_bytes());
        bytes.extend(namespace.name.as_bytes());
        put_extents(&mut bytes, &namespace.extents);
    }
    put_extents(&mut bytes, table.bad.runs());
    if bytes.len() > COPY_BYTES {
        return Err(TooLong { bytes: bytes.len() });
    }
    let length = (bytes.len() as u32).to_le_bytes();
    bytes[12..16].copy_from_slice(&length);
    let sum = checksum(&bytes).to_le_bytes();
    bytes[CHECKSUM].copy_from_slice(&sum);
    Ok(bytes)
}

/// The checksum of a label of at least 28 bytes, its own field taken for zero.
pub fn checksum(label: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&label[..CHECKSUM.start]);
    sum.update(&[0; CHECKSUM.end - CHECKSUM.start]);
    sum.update(&label[CHECKSUM.end..]);
    sum.finalize()
}

fn put_extents(bytes: &mut Vec<u8>, extents: &[Extent]) {
    for extent in extents {
        bytes.extend(extent.start.to_le_bytes());
        bytes.extend(extent.len.to_le_bytes());
    }
}

/// Takes numbers from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], LabelFault> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(LabelFault::Invalid("it ends too early"))?;
        self.0 = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LabelFault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, LabelFault> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, LabelFault> {
        self.array().map(u64::from_le_bytes)
    }

    fn extents(&mut self, count: u32, capacity: u64) -> Result<Vec<Extent>, LabelFault> {
        let mut extents = Vec::new();
        for _ in 0..count {
            let (start, len) = (self.u64()?, self.u64()?);
            if len == 0 || start.checked_add(len).is_none_or(|end| end > capacity) {
                return Err(LabelFault::Invalid("a range lies outside the store"));
            }
            extents.push(Extent { start, len });
        }
        Ok(extents)
    }

    fn geometry(order: u32) -> Result<Geometry, LabelFault> {
        let known = [Geometry::K4, Geometry::M2, Geometry::G1];
        let found = known.into_iter().find(|geometry| geometry.order() == order);
        found.ok_or(LabelFault::Invalid("an alignment is none of 4K, 2M and 1G"))
    }
}

/// What the bytes of one copy say.
pub fn decode(copy: &[u8]) -> Result<Label, LabelFault> {
    let mut reader = Reader(copy);
    let magic = reader.array()?;
    if magic != MAGIC {
        let blank = copy.iter().all(|byte| *byte == 0);
        return Err(if blank { LabelFault::Blank } else { LabelFault::Foreign(magic) });
    }
    let (version, length, sequence, found) = (reader.u32()?, reader.u32()?, reader.u64()?, reader.u32()?);
    // A length that cannot be is as good as a wrong checksum: nothing says which of the two broke.
    let whole = copy.get(..length as usize).filter(|bytes| bytes.len() >= CHECKSUM.end).unwrap_or(copy);
    let expected = checksum(whole);
    if found != expected {
        return Err(LabelFault::Checksum { found, expected });
    }
    if version > VERSION {
        return Err(LabelFault::Newer { found: version });
    }
    if sequence == u64::MAX {
        return Err(LabelFault::Invalid("no label can follow it"));
    }
    let mut reader = Reader(whole.get(CHECKSUM.end..).unwrap_or_default());
    let region = reader.u32()?;
    let uuid = Uuid(reader.array()?);
    let capacity = reader.u64()?;
    // So that no byte offset overflows.
    if capacity > u64::MAX >> 13 {
        return Err(LabelFault::Invalid("the capacity is more than there can be"));
    }
    let page = Reader::geometry(reader.u32()?)?;
    let (namespaces, bad) = (reader.u32()?, reader.u32()?);
    let mut table = Table::new(region, uuid, page, capacity);
    for _ in 0..namespaces {
        table.namespaces.push(namespace(&mut reader, &table)?);
    }
    let bad = reader.extents(bad, capacity)?;
    table.bad = BadPages::from_sorted(bad).ok_or(LabelFault::Invalid("the bad pages are not in order"))?;
    check(&table)?;
    Ok(Label { sequence, table })
}

fn namespace(reader: &mut Reader<'_>, table: &Table) -> Result<Namespace, LabelFault> {
    let id = NamespaceId(reader.u32()?);
    let [mode, order, name, _] = reader.array()?;
    let mode = *Mode::ALL.get(usize::from(mode)).ok_or(LabelFault::Invalid("a mode that does not exist"))?;
    let align = Reader::geometry(order.into())?;
    let uuid = Uuid(reader.array()?);
    let extents = reader.u32()?;
    let name = String::from_utf8(reader.take(name.into())?.to_vec());
    let name = name.map_err(|_| LabelFault::Invalid("a name is no text"))?;
    if name.len() > Namespace::NAME_MAX {
        return Err(LabelFault::Invalid("a name is too long"));
    }
    let extents = reader.extents(extents, table.capacity)?;
    Ok(Namespace { id, uuid, name, mode, align, extents })
}

/// What one namespace by itself does not show.
fn check(table: &Table) -> Result<(), LabelFault> {
    let all = || table.namespaces.iter();
    if table.namespaces.windows(2).any(|pair| pair[0].id >= pair[1].id) {
        return Err(LabelFault::Invalid("the namespaces are not in order"));
    }
    if all().any(|own| own.align < table.page) {
        return Err(LabelFault::Invalid("an alignment is less than the medium's pages"));
    }
    if all().any(|own| own.extents.iter().any(|extent| !extent.is_aligned(own.align))) {
        return Err(LabelFault::Invalid("a range is not aligned"));
    }
    let taken: Vec<Extent> = all().flat_map(|own| own.extents.iter().copied()).collect();
    let used: u128 = taken.iter().map(|extent| u128::from(extent.len)).sum();
    let whole = Extent { start: 0, len: table.capacity };
    let free: u128 = gaps(whole, taken).iter().map(|gap| u128::from(gap.len)).sum();
    if used + free != u128::from(table.capacity) {
        return Err(LabelFault::Invalid("two ranges overlap"));
    }
    Ok(())
}

const _: () = assert!(HEADER == CHECKSUM.end + 4 + 16 + 8 + 3 * 4 && COPY_BYTES.is_multiple_of(4096));
