//! Mappings that are taken away and put back, and how persistent memory is mapped.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering as Std};

use rustix::io::Errno;

use super::*;
use crate::store::Spec;

const LEN: u64 = 4 << 20;

/// Ends the other threads, when an assertion fails as well.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Std::Relaxed);
    }
}

fn device() -> Device {
    let store = Arc::new(Store::memory(ByteSize::new(LEN), None, 0).unwrap());
    let spec = Spec { align: Some(Geometry::K4), ..Spec::default() };
    let id = store.create_namespace(&spec).unwrap();
    Device::open(&store, id, Faults::Kernel).unwrap()
}

/// Whether the byte at `ptr` can be read, as a system call finds it.
fn readable(ptr: *const u8) -> bool {
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the kernel reads the byte, or says that it cannot.
    let wrote = unsafe { libc::write(writer.as_raw_fd(), ptr.cast(), 1) };
    wrote == 1
}

#[test]
fn a_device_that_was_killed_is_opened_by_nobody() {
    let device = device();
    let mapping = device.map(0, LEN).unwrap();
    let (part, ptr) = (device.core().parts().pop().unwrap(), mapping.as_ptr().as_ptr());
    let pages = LEN / PAGE_SIZE as u64;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        for _ in 0..2 {
            // As a thread that maps the device at the moment, and one that follows the labels.
            scope.spawn(|| {
                while !stop.load(Std::Relaxed) {
                    part.open(0, pages).unwrap();
                }
            });
        }
        for round in 0..500 {
            part.kill().unwrap();
            for _ in 0..4 {
                assert!(!readable(ptr), "round {round}: a page of a device that is gone");
                std::thread::yield_now();
            }
            part.revive().unwrap();
            assert!(readable(ptr), "round {round}");
        }
    });
}

#[test]
fn a_page_that_is_lost_while_it_is_opened_stays_away() {
    let device = device();
    let mapping = device.map(0, LEN).unwrap();
    let (part, ptr) = (device.core().parts().pop().unwrap(), mapping.as_ptr().as_ptr());
    let pfn = device.pfn(0).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(Std::Relaxed) {
                part.open(0, 8).unwrap();
            }
        });
        for round in 0..500 {
            device.pagemap().memory_failure(pfn).unwrap();
            std::thread::yield_now();
            assert!(!readable(ptr), "round {round}: a page that is lost");
            device.pagemap().clear_poison(PfnRange::new(pfn, PageCount::ONE));
            part.open(0, 8).unwrap();
            assert!(readable(ptr), "round {round}");
        }
    });
}

#[test]
fn persistent_memory_is_mapped_so_that_a_flush_is_enough() {
    // The kernel refuses the flag for this file, which shows that it was asked.
    let refused = |error: &std::io::Error| Errno::from_io_error(error) == Some(Errno::OPNOTSUPP);
    let device = Device::over(Source::not_persistent(LEN), Faults::Kernel).unwrap();
    for sync in [false, true] {
        let told = device.map_with(0, LEN, MapOptions { sync, ..MapOptions::default() }).unwrap_err();
        assert!(matches!(&told, MapError::Io { error, .. } if refused(error)), "{told}");
    }
    let told = device.write_at(0, &[1]).unwrap_err();
    assert!(matches!(&told, AccessError::Io(error) if refused(error)), "{told}");
}
