//! What several tests need.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::device::DeviceError;
use uhmm_dax::store::{Mode, NamespaceId, Spec, Store};
use uhmm_dax::{Device, Faults};
use uhmm_sys::hugetlb::{Huge, Pool};

/// A directory that is gone with its owner.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    /// A fresh directory on a disk.
    pub(crate) fn new(name: &str) -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("uhmm-dax-{name}-{}-{serial}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Huge pages that were reserved for a test, and are given back with this. One test has some at a time.
pub(crate) struct HugePages {
    size: Huge,
    count: usize,
    _alone: MutexGuard<'static, ()>,
}

/// Keeps other tests from the pools.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HugePages {
    /// Reserves `count` pages; else says why not.
    pub(crate) fn reserve(size: Huge, count: usize) -> Option<Self> {
        let alone = alone();
        let grown = Pool::read(size).and_then(|pool| Ok((pool, Pool::resize(size, pool.total + count)?)));
        match grown {
            Ok((before, after)) if after.total == before.total + count => {
                Some(Self { size, count, _alone: alone })
            }
            Ok((before, after)) => {
                println!(
                    "skipped: of {count} huge pages ({size:?}) {} could be reserved",
                    after.total - before.total
                );
                let _ = Pool::resize(size, before.total);
                None
            }
            Err(error) => {
                println!("skipped: huge pages ({size:?}) cannot be reserved: {error}");
                None
            }
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let back = Pool::read(self.size).and_then(|pool| Pool::resize(self.size, pool.total - self.count));
        assert!(back.is_ok(), "{back:?}");
    }
}

/// What lies under a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Under {
    /// Huge pages of its alignment.
    Huge(Huge),
    /// Ordinary memory.
    Memory,
    /// A file on a disk.
    File,
}

/// A store with one namespace over all of it.
pub(crate) struct Bed {
    // In the order in which they go.
    pub(crate) id: NamespaceId,
    pub(crate) store: Arc<Store>,
    _scratch: Option<Scratch>,
    _pages: Option<HugePages>,
}

impl Bed {
    /// With room for `size`; nothing, with a word, where there are no huge pages.
    pub(crate) fn new(under: Under, size: ByteSize, align: Geometry, mode: Mode) -> Option<Self> {
        let mut pages = None;
        let mut scratch = None;
        let store = match under {
            Under::Huge(huge) => {
                pages = Some(HugePages::reserve(huge, size.bytes() as usize / huge.bytes())?);
                Store::memory(size, Some(huge), 0).unwrap()
            }
            Under::Memory => Store::memory(size, None, 0).unwrap(),
            Under::File => {
                let place = Scratch::new("bed");
                let store = Store::create(&place.file("pmem.img"), size, 0).unwrap();
                scratch = Some(place);
                store
            }
        };
        let store = Arc::new(store);
        let id = store.create_namespace(&Spec { align: Some(align), mode, ..Spec::default() }).unwrap();
        Some(Self { id, store, _scratch: scratch, _pages: pages })
    }

    /// A device over it; nothing, with a word, where userfaultfd is not to be had.
    pub(crate) fn device(&self, faults: Faults) -> Option<Device> {
        match Device::open(&self.store, self.id, faults) {
            Err(DeviceError::Userfault(why)) if std::env::var_os("UHMM_REQUIRE_UFFD").is_none() => {
                println!("skipped: {why}");
                None
            }
            device => Some(device.unwrap()),
        }
    }
}

/// Whether the byte at `at` can be read, as the kernel finds: it says `EFAULT` where a program gets SIGBUS.
pub(crate) fn readable(at: *const u8) -> bool {
    let (_read, write) = rustix::pipe::pipe().unwrap();
    // SAFETY: none of the kernel's reads goes past the byte, and the slice is not looked at here.
    let byte = unsafe { std::slice::from_raw_parts(at, 1) };
    match rustix::io::write(&write, byte) {
        Ok(1) => true,
        Err(rustix::io::Errno::FAULT) => false,
        other => panic!("{other:?}"),
    }
}
