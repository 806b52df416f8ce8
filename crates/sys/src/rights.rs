//! What the program may do with a range of its memory: `PROCMAP_QUERY`.
//!
//! What     [`MappingRights::list`] lists the mappings of a range, and whether they may be read and written;
//!          [`MappingRights::entries`] tells what is behind them as well.
//! Why      a page map tells what is there, not what is permitted; and the list of all mappings is long where a few
//!          are asked about.
//! Owns     descriptors of `/proc/thread-self/maps`. An answer is old when it arrives.
//! Fallback where the kernel does not know the request (before 6.11), the list is read.
//! Locks    one around the reader of the list; nothing is called inside that could take another.
//! Fails    with the kernel's error.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use uhmm_addr::{PageCount, VaRange, VirtAddr, Vpn};
use uhmm_core::host::Rights;

use crate::futex::Lock;
use crate::maps::{MapEntry, MapsReader};
use crate::uapi;

#[cfg(test)]
mod tests;

/// Descriptors of this process's mappings.
#[derive(Debug)]
pub struct MappingRights {
    file: OwnedFd,
    list: Lock<MapsReader>,
    fallback: AtomicBool,
}

/// Room for the name of a mapping: a path, the remark that it was deleted, and a zero.
const NAME: usize = 4096 + 16;

/// Where the mapping is that an answer is about.
fn range_of(answer: &uapi::procmap_query) -> Option<VaRange> {
    let start = VirtAddr::new(answer.vma_start as usize).page();
    VaRange::of_pages(start, VirtAddr::new(answer.vma_end as usize).page().since(start))
}

/// A question about one mapping, and the answer.
struct Request(uapi::procmap_query);

// SAFETY: the opcode is made from the size of `procmap_query`, and `as_ptr` points to one. The kernel writes to it, and
// to the buffer for a name that it may name; whoever makes a `Request` keeps that alive (`MappingRights::query`).
unsafe impl Ioctl for Request {
    type Output = uapi::procmap_query;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        uapi::PROCMAP_QUERY
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, arg: *mut core::ffi::c_void) -> Result<Self::Output, Errno> {
        // SAFETY: this is the pointer that `as_ptr` gave, to a structure that `ioctl` still holds.
        Ok(unsafe { *arg.cast::<uapi::procmap_query>() })
    }
}

impl MappingRights {
    /// Opens the mappings of this process.
    pub fn open() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open("/proc/thread-self/maps", flags, Mode::empty())?;
        Ok(Self { file, list: Lock::new(MapsReader::open()?), fallback: AtomicBool::new(false) })
    }

    /// The mappings of `range`, cut at its ends, in order, as many as fit into `found`. Returns how many those are, and
    /// the page up to which was looked.
    pub fn list(&self, range: VaRange, found: &mut [Rights]) -> io::Result<(usize, Vpn)> {
        if !self.fallback.load(Ordering::Relaxed) {
            match self.ask(range, found) {
                Err(Errno::NOTTY | Errno::INVAL) => self.fallback.store(true, Ordering::Relaxed),
                answer => return Ok(answer?),
            }
        }
        self.read(range, found)
    }

    /// Calls `f` for every mapping of `range`, whole, in order. Each is what it was at one moment, and no two of them
    /// leave a hole between them that was none: mappings that are split and joined meanwhile do not fall out, as they
    /// may where the list is read. One that was joined with the one before it meanwhile begins where that one began.
    pub fn entries(&self, range: VaRange, mut f: impl FnMut(MapEntry<'_>)) -> io::Result<()> {
        if !self.fallback.load(Ordering::Relaxed) {
            match self.ask_for_entries(range, &mut f) {
                Err(Errno::NOTTY | Errno::INVAL) => self.fallback.store(true, Ordering::Relaxed),
                answer => return Ok(answer?),
            }
        }
        self.list.lock().for_each(|entry| {
            if entry.range.intersect(range).is_some() {
                f(entry);
            }
        })
    }

    fn ask_for_entries(&self, range: VaRange, f: &mut impl FnMut(MapEntry<'_>)) -> Result<(), Errno> {
        let mut name = vec![0; NAME];
        let mut at = range.first();
        while at < range.end_page() {
            let Some(answer) = self.query(at, &mut name)? else { break };
            let Some(mapping) = range_of(&answer) else { break };
            if mapping.first() >= range.end_page() {
                break;
            }
            at = mapping.end_page();
            let is = |flag| answer.vma_flags & flag != 0;
            // The size counts the zero at the end.
            let named = (answer.vma_name_size as usize).saturating_sub(1).min(name.len());
            f(MapEntry {
                range: mapping,
                read: is(uapi::MAPPING_READABLE),
                write: is(uapi::MAPPING_WRITABLE),
                exec: is(uapi::MAPPING_EXECUTABLE),
                shared: is(uapi::MAPPING_SHARED),
                inode: answer.inode,
                path: &name[..named],
            });
        }
        Ok(())
    }

    /// The mapping of `at`, or the next one, if there is one; its name is put into `name` if there is room at all.
    fn query(&self, at: Vpn, name: &mut [u8]) -> Result<Option<uapi::procmap_query>, Errno> {
        let name_at = if name.is_empty() { 0 } else { name.as_mut_ptr().expose_provenance() as u64 };
        let question = uapi::procmap_query {
            size: size_of::<uapi::procmap_query>() as u64,
            query_flags: uapi::COVERING_OR_NEXT,
            query_addr: at.base().get() as u64,
            vma_start: 0,
            vma_end: 0,
            vma_flags: 0,
            vma_page_size: 0,
            vma_offset: 0,
            inode: 0,
            dev_major: 0,
            dev_minor: 0,
            vma_name_size: name.len() as u32,
            build_id_size: 0,
            vma_name_addr: name_at,
            build_id_addr: 0,
        };
        // SAFETY: `Request` describes this request (see there), and `name` is borrowed exclusively and as long as said.
        match unsafe { ioctl(&self.file, Request(question)) } {
            Ok(answer) => Ok(Some(answer)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    fn ask(&self, range: VaRange, found: &mut [Rights]) -> Result<(usize, Vpn), Errno> {
        let mut at = range.first();
        for (filled, place) in found.iter_mut().enumerate() {
            let Some(rest) = VaRange::of_pages(at, range.end_page().since(at)) else {
                return Ok((filled, at));
            };
            let Some(answer) = self.query(at, &mut [])? else { return Ok((filled, range.end_page())) };
            let mapping = range_of(&answer).and_then(|mapping| mapping.intersect(rest));
            let Some(range) = mapping else { return Ok((filled, range.end_page())) };
            *place = Rights {
                range,
                read: answer.vma_flags & uapi::MAPPING_READABLE != 0,
                write: answer.vma_flags & uapi::MAPPING_WRITABLE != 0,
                shared: answer.vma_flags & uapi::MAPPING_SHARED != 0,
                file: answer.inode != 0,
            };
            at = range.end_page();
        }
        Ok((found.len(), at))
    }

    /// Whether all of `range` is mapped. `false` where that cannot be told without reading the list.
    pub fn is_mapped(&self, range: VaRange) -> bool {
        let mut at = range.first();
        while at < range.end_page() {
            if self.fallback.load(Ordering::Relaxed) {
                return false;
            }
            match self.query(at, &mut []).map(|answer| answer.as_ref().and_then(range_of)) {
                Ok(Some(mapping)) if mapping.contains(at) => at = mapping.end_page(),
                Ok(_) | Err(_) => return false,
            }
        }
        true
    }

    fn read(&self, range: VaRange, found: &mut [Rights]) -> io::Result<(usize, Vpn)> {
        let (mut filled, mut end) = (0, None);
        self.list.lock().for_each(|entry| {
            let Some(common) = entry.range.intersect(range) else { return };
            match found.get_mut(filled) {
                Some(place) => {
                    let MapEntry { read, write, shared, inode, .. } = entry;
                    *place = Rights { range: common, read, write, shared, file: inode != 0 };
                    filled += 1;
                }
                None => _ = end.get_or_insert(common.first()),
            }
        })?;
        Ok((filled, end.unwrap_or(range.first().forward(range.pages().max(PageCount::ONE)))))
    }
}
