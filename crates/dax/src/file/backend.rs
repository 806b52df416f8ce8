//! Where the table of files is kept.
//!
//! What     [`Backend`], the first blocks of a namespace as the storage of `redb`: a header, and behind it the table's
//!          own bytes.
//! Why      a table that is written copy on write, with checksums and two roots, survives a crash at any write; there
//!          is no need for a second one.
//! Header   one sector, which a crash does not tear: the magic, a version, the size of blocks, how many bytes the
//!          table has, and a checksum.
//! Fails    with an `io::Error`: `StorageFull` when the table would outgrow its place, `InvalidData` where the
//!          header is none.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use redb::StorageBackend;
use uhmm_addr::{Geometry, PAGE_SIZE};

use crate::store::Area;

const MAGIC: [u8; 8] = *b"UHMMDFS\0";
const VERSION: u32 = 1;
const SECTOR: usize = 512;
/// Where the table begins.
const TABLE_AT: u64 = PAGE_SIZE as u64;

/// The first blocks of a namespace.
#[derive(Debug)]
pub(super) struct Backend {
    area: Arc<dyn Area>,
    /// Bytes of the area.
    room: u64,
    align: Geometry,
    len: Mutex<u64>,
    /// The table was to outgrow its place.
    outgrown: AtomicBool,
}

/// A backend as a database has it: another one may have it afterwards.
#[derive(Debug)]
pub(super) struct Lent(pub(super) Arc<Backend>);

impl Backend {
    /// What is there; a blank area is formatted. A blank header alone is not a blank area.
    pub(super) fn open(area: Arc<dyn Area>, room: u64, align: Geometry) -> io::Result<Self> {
        let mut sector = [0; SECTOR];
        area.read(0, &mut sector)?;
        let backend = Self { area, room, align, len: Mutex::new(0), outgrown: AtomicBool::new(false) };
        if sector.iter().all(|byte| *byte == 0) {
            let mut behind = [0; PAGE_SIZE];
            backend.area.read(TABLE_AT, &mut behind)?;
            if behind.iter().any(|byte| *byte != 0) {
                let why = "its header is blank, and there is a table of files behind it; nothing was changed";
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            backend.write_header(0)?;
        } else {
            *backend.lock() = backend.header(&sector)?;
        }
        Ok(backend)
    }

    /// Bytes that the table may have.
    pub(super) fn table_room(&self) -> u64 {
        self.room - TABLE_AT
    }

    /// Whether the table was to outgrow its place since the last call.
    pub(super) fn take_outgrown(&self) -> bool {
        self.outgrown.swap(false, Ordering::SeqCst)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.len.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(&self, sector: &[u8; SECTOR]) -> io::Result<u64> {
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let word = |at: usize| sector[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let (sum, found) = (crc32fast::hash(&sector[..28]), word(28));
        if sector[..8] != MAGIC || sum != found {
            return Err(bad(
                "the namespace holds no files, or its header is broken; nothing was changed".into()
            ));
        }
        if word(8) > VERSION {
            return Err(bad(format!(
                "its files are of version {}, and this uhmm knows version {VERSION}",
                word(8)
            )));
        }
        if word(12) != self.align.order() {
            let was = 4096_u64 << word(12).min(40);
            return Err(bad(format!(
                "its files are in blocks of {was} bytes, and the namespace is aligned to {}",
                self.align
            )));
        }
        let len = sector[16..24].try_into().map_or(0, u64::from_le_bytes);
        if len > self.room - TABLE_AT {
            Err(bad(format!("its table has {len} bytes, more than there is room for")))
        } else {
            Ok(len)
        }
    }

    fn write_header(&self, len: u64) -> io::Result<()> {
        let mut sector = [0; SECTOR];
        sector[..8].copy_from_slice(&MAGIC);
        sector[8..12].copy_from_slice(&VERSION.to_le_bytes());
        sector[12..16].copy_from_slice(&self.align.order().to_le_bytes());
        sector[16..24].copy_from_slice(&len.to_le_bytes());
        let sum = crc32fast::hash(&sector[..28]);
        sector[28..32].copy_from_slice(&sum.to_le_bytes());
        self.area.write(0, &sector)?;
        self.area.sync()
    }

    fn inside(&self, offset: u64, bytes: usize) -> io::Result<u64> {
        let end = offset.checked_add(bytes as u64).filter(|end| *end <= *self.lock());
        end.map(|_| TABLE_AT + offset).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl StorageBackend for Lent {
    fn len(&self) -> io::Result<u64> {
        Ok(*self.0.lock())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.area.read(self.0.inside(offset, out.len())?, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if len > self.0.table_room() {
            self.0.outgrown.store(true, Ordering::SeqCst);
            let why = format!(
                "the table of files would have {len} bytes, and has room for {}",
                self.0.table_room()
            );
            return Err(io::Error::new(io::ErrorKind::StorageFull, why));
        }
        let mut now = self.0.lock();
        // New bytes are zero, before the header speaks of them.
        let zeros = [0; 64 << 10];
        for at in (*now..len).step_by(zeros.len()) {
            let part = zeros.len().min((len - at) as usize);
            self.0.area.write(TABLE_AT + at, &zeros[..part])?;
        }
        self.0.area.sync()?;
        self.0.write_header(len)?;
        *now = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.area.sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.area.write(self.0.inside(offset, data.len())?, data)
    }
}
