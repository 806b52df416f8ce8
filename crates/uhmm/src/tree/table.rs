//! A process's page table as a file.
//!
//! What     [`Table`]: the words that a process maps, read and written with system calls.
//! Why      the keeper looks at a table only while nobody else changes it: before a child has taken over, and
//!          when its process is gone. Through a mapping, a file that was cut short would be a SIGBUS.
//! Owns     the descriptor. References that the words hold are the caller's business.
//! Fails    a word that cannot be read counts as lost ([`PageWord::POISONED`]): never as empty, which would
//!          read as zeros. Storing fails with the kernel's error, and then nothing has changed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{SealFlags, SeekFrom};
use rustix::io::Errno;
use uhmm_addr::{CHUNK_PAGES, PageCount, VaRange, Vpn};
use uhmm_core::pagetable::PageWord;
use uhmm_sys::memfd::Memfd;

use super::protocol::{TABLE_FILE_BYTES, TABLE_PAGES, TABLE_USED_OFFSET, TABLE_WORD_BYTES};

const WORD: u64 = size_of::<u64>() as u64;
/// Words that are read at once: those of a chunk, a page of the file.
const BLOCK: usize = CHUNK_PAGES;

/// A page table in a file.
#[derive(Debug)]
pub struct Table {
    fd: OwnedFd,
}

impl Table {
    /// An empty one.
    pub fn create() -> io::Result<Self> {
        let memfd = Memfd::create("uhmm-table", TABLE_FILE_BYTES, None)?;
        Ok(Self { fd: memfd.fd().try_clone_to_owned()? })
    }

    /// The table behind `fd`, which another process made. `EINVAL` if it cannot be one.
    pub fn adopt(fd: OwnedFd) -> io::Result<Self> {
        // Only files in memory have seals; and whatever else it is, reading it must not wait.
        let _: SealFlags = rustix::fs::fcntl_get_seals(&fd)?;
        if rustix::fs::fstat(&fd)?.st_size as u64 != TABLE_FILE_BYTES {
            return Err(Errno::INVAL.into());
        }
        Ok(Self { fd })
    }

    /// Another table with the same words.
    pub fn duplicate(&self, mut each: impl FnMut(PageWord)) -> io::Result<Self> {
        let copy = Self::create()?;
        let mut failed = None;
        self.walk(None, |page, word| {
            if failed.is_none() {
                match copy.store(page, word) {
                    Ok(()) => each(word),
                    Err(error) => failed = Some(error),
                }
            }
        });
        failed.map_or(Ok(copy), Err)
    }

    /// The word of `page`. A page outside of the table has an empty one.
    pub fn load(&self, page: Vpn) -> PageWord {
        if page.get() >= TABLE_PAGES.get() {
            return PageWord::EMPTY;
        }
        let mut bytes = [0; WORD as usize];
        match rustix::io::pread(&self.fd, &mut bytes, page.get() as u64 * WORD) {
            Ok(got) if got == bytes.len() => PageWord::from_raw(u64::from_ne_bytes(bytes)),
            _ => PageWord::POISONED,
        }
    }

    /// Stores a word, and notes that its chunk is used.
    pub fn store(&self, page: Vpn, word: PageWord) -> io::Result<()> {
        if page.get() >= TABLE_PAGES.get() {
            return Err(Errno::RANGE.into());
        }
        let at = TABLE_USED_OFFSET + page.chunk() as u64 / 8;
        let mut used = [0];
        rustix::io::pread(&self.fd, &mut used, at)?;
        let bit = 1 << (page.chunk() % 8);
        if used[0] & bit == 0 {
            self.write(&[used[0] | bit], at)?;
        }
        self.write(&word.raw().to_ne_bytes(), page.get() as u64 * WORD)
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match rustix::io::retry_on_intr(|| rustix::io::pwrite(&self.fd, bytes, at))? {
            done if done == bytes.len() => Ok(()),
            _ => Err(Errno::NOSPC.into()),
        }
    }

    /// Shows every word of `range` (of the whole table: `None`) that is not empty to `each`, in order.
    /// Moves the file's offset, which duplicates of the descriptor share.
    pub fn walk(&self, range: Option<VaRange>, mut each: impl FnMut(Vpn, PageWord)) {
        self.walk_while(range, |page, word| {
            each(page, word);
            true
        });
    }

    /// As [`Table::walk`], until `each` says `false`. Says whether the end was reached.
    pub fn walk_while(&self, range: Option<VaRange>, mut each: impl FnMut(Vpn, PageWord) -> bool) -> bool {
        let all = PageCount::new(TABLE_PAGES.get());
        let range = match range {
            None => VaRange::of_pages(Vpn::new(0), all),
            Some(range) => VaRange::of_pages(Vpn::new(0), all).and_then(|all| all.intersect(range)),
        };
        let Some(range) = range else { return true };
        let (first, end) = (range.first().get() as u64 * WORD, range.end_page().get() as u64 * WORD);
        let mut at = first;
        while let Some(data) = self.next_data(at, end) {
            at = data;
            let mut bytes = [0; BLOCK * WORD as usize];
            let block_end = (at / bytes.len() as u64 + 1) * bytes.len() as u64;
            let wanted = (block_end.min(end) - at) as usize;
            let got = rustix::io::pread(&self.fd, &mut bytes[..wanted], at).unwrap_or(0);
            for (n, word) in bytes[..got].as_chunks().0.iter().enumerate() {
                let word = PageWord::from_raw(u64::from_ne_bytes(*word));
                let page = Vpn::new((at / WORD) as usize + n);
                if word != PageWord::EMPTY && !each(page, word) {
                    return false;
                }
            }
            at += wanted as u64;
        }
        true
    }

    /// The first byte of data at or behind `at`, if it lies before `end`.
    fn next_data(&self, at: u64, end: u64) -> Option<u64> {
        if at >= end || end > TABLE_WORD_BYTES {
            return None;
        }
        let data = rustix::fs::seek(&self.fd, SeekFrom::Data(at)).ok()?;
        (data < end).then_some(data)
    }
}

impl AsFd for Table {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_addr::Pfn;

    fn words(table: &Table, range: Option<VaRange>) -> Vec<(usize, PageWord)> {
        let mut found = Vec::new();
        table.walk(range, |page, word| found.push((page.get(), word)));
        found
    }

    #[test]
    fn words_are_found_where_they_were_stored() {
        let table = Table::create().unwrap();
        assert_eq!(words(&table, None), []);
        let device = PageWord::device(Pfn::new(7));
        let last = TABLE_PAGES.get() - 1;
        for page in [3, 511, 512, 1 << 30, last] {
            table.store(Vpn::new(page), device).unwrap();
            assert_eq!(table.load(Vpn::new(page)), device);
        }
        assert_eq!(table.load(Vpn::new(4)), PageWord::EMPTY);
        assert_eq!(words(&table, None), [3, 511, 512, 1 << 30, last].map(|page| (page, device)));
        let part = VaRange::of_pages(Vpn::new(4), PageCount::new(508)).unwrap();
        assert_eq!(words(&table, Some(part)), [(511, device)]);
        assert!(table.store(Vpn::new(last + 1), device).is_err());
        assert_eq!(table.load(Vpn::new(last + 1)), PageWord::EMPTY);
    }

    #[test]
    fn the_bits_of_used_chunks_are_those_of_core() {
        let table = Table::create().unwrap();
        for page in [0, 512 * 77, 512 * 200 + 5] {
            table.store(Vpn::new(page), PageWord::RESIDENT).unwrap();
        }
        let mut bits = [0_u8; 8];
        let mut used = Vec::new();
        for word in 0..4 {
            rustix::io::pread(&table.fd, &mut bits, TABLE_USED_OFFSET + word * 8).unwrap();
            let bits = u64::from_ne_bytes(bits);
            used.extend((0..64).filter(|n| bits >> n & 1 != 0).map(|n| word * 64 + n));
        }
        assert_eq!(used, [0, 77, 200]);
    }

    #[test]
    fn a_duplicate_has_the_same_words() {
        let table = Table::create().unwrap();
        table.store(Vpn::new(9), PageWord::RESIDENT).unwrap();
        table.store(Vpn::new(99_999), PageWord::device(Pfn::new(1))).unwrap();
        let mut seen = 0;
        let copy = table.duplicate(|_| seen += 1).unwrap();
        assert_eq!((words(&copy, None), seen), (words(&table, None), 2));
    }

    #[test]
    fn what_is_no_table_is_refused_and_what_cannot_be_read_is_lost() {
        assert!(Table::adopt(std::io::pipe().unwrap().0.into()).is_err());
        let small = Memfd::create("uhmm-test", 4096, None).unwrap();
        assert!(Table::adopt(small.fd().try_clone_to_owned().unwrap()).is_err());
        let table = Table::create().unwrap();
        let table = Table::adopt(table.fd.try_clone().unwrap()).unwrap();
        rustix::fs::ftruncate(&table.fd, 8).unwrap();
        assert_eq!(table.load(Vpn::new(1)), PageWord::POISONED);
    }
}
