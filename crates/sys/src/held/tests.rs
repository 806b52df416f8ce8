//! Against the running kernel. Where it permits no io_uring, a test says so and passes.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};
use uhmm_addr::{PAGE_SIZE, VirtAddr};

use super::*;

const PAGES: usize = 4;

/// A private mapping of a file, which is nowhere named.
fn private_file() -> VaRange {
    let name = std::env::temp_dir().join(format!("uhmm-held-{}-{:p}", std::process::id(), &PAGES));
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&name).unwrap();
    std::fs::remove_file(name).unwrap();
    file.set_len((PAGES * PAGE_SIZE) as u64).unwrap();
    let (len, prot) = (PAGES * PAGE_SIZE, ProtFlags::READ | ProtFlags::WRITE);
    // SAFETY: the kernel chooses an address that nothing uses.
    let at =
        unsafe { rustix::mm::mmap(core::ptr::null_mut(), len, prot, MapFlags::PRIVATE, file.as_fd(), 0) };
    let at = at.unwrap().cast::<u8>();
    at.expose_provenance();
    VaRange::new(VirtAddr::of(at), len).unwrap()
}

fn word(range: VaRange, page: usize) -> &'static AtomicU64 {
    // SAFETY: the tests' own mappings, which stay; everybody uses the word as this atomic.
    unsafe { &*core::ptr::with_exposed_provenance(range.start().get() + page * PAGE_SIZE) }
}

fn copied(held: &HeldPages, page: usize) -> u64 {
    // SAFETY: the buffer is as long as the range, and nobody writes to it now.
    unsafe { held.contents().add(page * PAGE_SIZE).cast().read() }
}

fn is_usable() -> bool {
    let usable = IoUring::new(1).is_ok();
    if !usable {
        println!("skipped: io_uring is not permitted");
    }
    usable
}

#[test]
fn what_was_stored_until_the_mapping_went_is_there() {
    if !is_usable() {
        return;
    }
    let range = private_file();
    (0..PAGES).for_each(|page| word(range, page).store(1, Ordering::Relaxed));
    let mut held = HeldPages::hold(range).unwrap();
    assert_eq!((0..PAGES).map(|page| copied(&held, page)).sum::<u64>(), PAGES as u64);
    (0..PAGES).for_each(|page| word(range, page).store(2 + page as u64, Ordering::Relaxed));
    let fresh = Mapping::replacement(range.bytes(), true, true).unwrap();
    // SAFETY: the test's own memory, which it gives up.
    unsafe { fresh.replace(range.start()) }.unwrap();
    (0..PAGES).for_each(|page| assert_eq!(word(range, page).swap(99, Ordering::Relaxed), 0, "a fresh page"));
    held.refresh().unwrap();
    (0..PAGES).for_each(|page| assert_eq!(copied(&held, page), 2 + page as u64));
}

#[test]
fn what_may_not_be_written_is_copied() {
    let range = private_file();
    (0..PAGES).for_each(|page| word(range, page).store(7, Ordering::Relaxed));
    let at = core::ptr::with_exposed_provenance_mut(range.start().get());
    // SAFETY: the test's own memory, which it only reads from now on.
    unsafe { rustix::mm::mprotect(at, range.bytes(), rustix::mm::MprotectFlags::READ) }.unwrap();
    let held = HeldPages::copied(range).unwrap();
    (0..PAGES).for_each(|page| assert_eq!(copied(&held, page), 7));
    if is_usable() {
        assert!(HeldPages::hold(range).is_err(), "a frame is held to be written");
    }
}

#[test]
fn what_may_not_be_read_cannot_be_held() {
    let range = private_file();
    let at = core::ptr::with_exposed_provenance_mut::<u8>(range.start().get());
    let (at, none) = (at.wrapping_add(2 * PAGE_SIZE), rustix::mm::MprotectFlags::empty());
    // SAFETY: the test's own memory, and nobody uses it. A hole would be filled by whoever maps something next.
    unsafe { rustix::mm::mprotect(at.cast(), PAGE_SIZE, none) }.unwrap();
    assert!(HeldPages::hold(range).is_err() && HeldPages::copied(range).is_err());
}
