//! What every device must do, as tests.
//!
//! What     one function per behaviour, and [`device_suite!`](macro@crate::device_suite), which makes a `#[test]`
//!          of each for one kind of device.
//! Why      migration and fault-back rely on these and on nothing else.
//! Owns     [`Ram`], the memory that transfers copy from and to.
//! Fails    by panicking, as tests do.
//!
//! A device under test is fresh (zeros), and has at least [`LEAST_PAGES`] pages.

use std::alloc::{self, Layout};
use std::cell::Cell;
use std::collections::HashMap;
use std::ptr::NonNull;

use uhmm_addr::{PAGE_SIZE, PageCount};
use uhmm_core::device::{Device, DevicePage, Transfer, TransferError};

/// A device under test has at least so many pages (16 MiB).
pub const LEAST_PAGES: usize = 4096;

/// Makes a module `$name` of one test per behaviour. `$make` is called for each; it gives `Some` of a
/// `Box` or an `Arc` of a device, or `None` after it has printed what the machine lacks.
#[macro_export]
macro_rules! device_suite {
    ($name:ident, $make:expr) => {
        $crate::device_suite!(@tests $name, $make,
            unwritten_pages_read_as_zeros,
            what_was_written_is_read_back,
            batches_do_not_disturb_neighbours,
            last_page,
            discard_reads_as_zeros_and_leaves_neighbours,
            transfers_from_many_threads,
            failed_transfer_reports_and_others_complete,
            huge_pages_in_one_transfer,
            more_transfers_than_any_queue,
            nothing_to_do_is_fine,
        );
    };
    (@tests $name:ident, $make:expr, $($behaviour:ident,)*) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $(
                #[test]
                fn $behaviour() {
                    if let Some(device) = ($make)() {
                        $crate::device_suite::$behaviour(&*device);
                    }
                }
            )*
        }
    };
}

/// Page-aligned memory to transfer from and to, all zeros at first.
pub struct Ram {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory that its owner reaches through raw pointers.
unsafe impl Send for Ram {}

impl Ram {
    /// `pages` pages, at a multiple of 2 MiB.
    pub fn new(pages: usize) -> Self {
        let layout = Layout::from_size_align(pages.max(1) * PAGE_SIZE, 2 << 20).expect("a size that exists");
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc::alloc_zeroed(layout) };
        Self { base: NonNull::new(base).expect("memory for a test"), layout }
    }

    /// How many pages it has.
    pub fn pages(&self) -> usize {
        self.layout.size() / PAGE_SIZE
    }

    /// The transfer between `pages` pages from the `first` on and as many of the device. The `Ram` must
    /// outlive the transfer's use, which is why the suite keeps both in one function.
    pub fn transfer(&self, first: usize, pages: usize, page: DevicePage) -> Transfer {
        assert!(first + pages <= self.pages());
        // SAFETY: the bytes are part of this allocation, aligned to a page; references to them exist only
        // inside `fill` and `read`, which no transfer is under way in; tests keep reads of the same page apart.
        unsafe {
            let ram = self.base.add(first * PAGE_SIZE);
            Transfer::new(page, ram, PageCount::new(pages))
        }
    }

    /// Sets every byte of `page` from `stamp`, so that pages with different stamps differ everywhere.
    pub fn stamp(&mut self, page: usize, stamp: u64) {
        assert!(page < self.pages());
        // SAFETY: part of the allocation, and `&mut self` keeps everybody else out.
        let words =
            unsafe { std::slice::from_raw_parts_mut(self.base.add(page * PAGE_SIZE).as_ptr(), PAGE_SIZE) };
        for (index, word) in words.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&word_of(stamp, index));
        }
    }

    /// What `page` was stamped with; `Some(0)` for zeros, `None` for a mixture.
    pub fn stamp_of(&self, page: usize) -> Option<u64> {
        assert!(page < self.pages());
        // SAFETY: part of the allocation; no transfer is under way while a test looks.
        let bytes =
            unsafe { std::slice::from_raw_parts(self.base.add(page * PAGE_SIZE).as_ptr(), PAGE_SIZE) };
        let first = u64::from_le_bytes(bytes[..8].try_into().ok()?);
        let whole = (0..).zip(bytes.chunks_exact(8)).all(|(index, word)| word == word_of(first, index));
        whole.then_some(first)
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout by `new`.
        unsafe { alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// The word at `index` of a page stamped with `stamp`. The first one is the stamp.
fn word_of(stamp: u64, index: usize) -> [u8; 8] {
    stamp.wrapping_add((index as u64).wrapping_mul(stamp & 0xffff)).to_le_bytes()
}

/// A small generator (splitmix64), so that a failure can be repeated.
struct Random(Cell<u64>);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }

    fn next(&self) -> u64 {
        self.0.set(self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15));
        let mut z = self.0.get();
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Never zero, which is what an unwritten page reads as, and different in every word of a page.
    fn stamp(&self) -> u64 {
        self.next() | 1
    }
}

/// Writes in one batch, each `(first page of ram, pages, page of the device)`, and expects it to work.
pub fn write(device: &(impl Device + ?Sized), ram: &Ram, list: &[(usize, usize, u64)]) {
    let mut batch = batch(ram, list);
    device.write(&mut batch);
    batch.iter().for_each(|t| assert_eq!(t.outcome(), Ok(()), "write of {t:?}"));
}

/// Reads in one batch, likewise.
pub fn read(device: &(impl Device + ?Sized), ram: &Ram, list: &[(usize, usize, u64)]) {
    let mut batch = batch(ram, list);
    device.read(&mut batch);
    batch.iter().for_each(|t| assert_eq!(t.outcome(), Ok(()), "read of {t:?}"));
}

fn batch(ram: &Ram, list: &[(usize, usize, u64)]) -> Vec<Transfer> {
    list.iter().map(|&(first, pages, page)| ram.transfer(first, pages, DevicePage(page))).collect()
}

fn capacity(device: &(impl Device + ?Sized)) -> usize {
    let pages = device.capacity().get();
    assert!(pages >= LEAST_PAGES, "the suite needs {LEAST_PAGES} pages, the device has {pages}");
    pages
}

/// The stamps of `pages` pages of the device from `page` on.
fn stamps(device: &(impl Device + ?Sized), page: u64, pages: usize) -> Vec<Option<u64>> {
    let mut ram = Ram::new(pages);
    (0..pages).for_each(|i| ram.stamp(i, 0xdead));
    read(device, &ram, &[(0, pages, page)]);
    (0..pages).map(|i| ram.stamp_of(i)).collect()
}

/// Pages that nobody wrote are zeros, wherever they are.
pub fn unwritten_pages_read_as_zeros(device: &(impl Device + ?Sized)) {
    let last = capacity(device) as u64 - 1;
    for page in [0, 1, 1000, last] {
        assert_eq!(stamps(device, page, 1), [Some(0)], "page {page}");
    }
    assert_eq!(stamps(device, 100, 300), vec![Some(0); 300]);
}

/// Random batches of 1 to 64 transfers of 1 to 512 pages each, against a model.
pub fn what_was_written_is_read_back(device: &(impl Device + ?Sized)) {
    let (random, pages) = (Random::new(1), capacity(device));
    let mut model = HashMap::new();
    let mut ram = Ram::new(pages.min(LEAST_PAGES));
    for _ in 0..10 {
        let list = random_batch(&random, ram.pages());
        for &(first, pages, page) in &list {
            for i in 0..pages {
                let stamp = random.stamp();
                ram.stamp(first + i, stamp);
                model.insert(page + i as u64, stamp);
            }
        }
        write(device, &ram, &list);
        let list = random_batch(&random, ram.pages());
        read(device, &ram, &list);
        for (first, pages, page) in list {
            for i in 0..pages {
                let expected = model.get(&(page + i as u64)).copied().unwrap_or(0);
                assert_eq!(ram.stamp_of(first + i), Some(expected), "page {}", page + i as u64);
            }
        }
    }
}

/// Transfers that overlap neither in RAM nor on the device, in random order, sometimes neighbours.
fn random_batch(random: &Random, pages: usize) -> Vec<(usize, usize, u64)> {
    let count = 1 + random.below(64);
    let share = pages / count;
    let mut list: Vec<_> = (0..count)
        .map(|i| {
            let len = if random.below(4) == 0 { share.min(512) } else { 1 + random.below(share.min(512)) };
            (i * share, len, (i * share + random.below(share - len + 1)) as u64)
        })
        .collect();
    if random.below(2) == 0 {
        (1..count).for_each(|i| list.swap(i, random.below(i + 1)));
    }
    list
}

/// Every second page is written; the others keep what they have.
pub fn batches_do_not_disturb_neighbours(device: &(impl Device + ?Sized)) {
    capacity(device);
    let mut ram = Ram::new(128);
    (0..128).for_each(|i| ram.stamp(i, 2 * i as u64 + 1));
    write(device, &ram, &[(0, 128, 512)]);
    (0..128).for_each(|i| ram.stamp(i, 1_000_001 + 2 * i as u64));
    let odd: Vec<_> = (0..64).map(|i| (2 * i + 1, 1, 513 + 2 * i as u64)).collect();
    write(device, &ram, &odd);
    let expected = |i: u64| Some(if i % 2 == 1 { 1_000_001 + 2 * i } else { 2 * i + 1 });
    assert_eq!(stamps(device, 512, 128), (0..128).map(expected).collect::<Vec<_>>());
    assert_eq!((stamps(device, 511, 1), stamps(device, 640, 1)), (vec![Some(0)], vec![Some(0)]));
}

/// The last page is a page like any other, alone and at the end of a transfer.
pub fn last_page(device: &(impl Device + ?Sized)) {
    let pages = capacity(device) as u64;
    let mut ram = Ram::new(8);
    (0..8).for_each(|i| ram.stamp(i, 11 + 2 * i as u64));
    write(device, &ram, &[(0, 1, pages - 1)]);
    assert_eq!(stamps(device, pages - 2, 2), [Some(0), Some(11)]);
    write(device, &ram, &[(0, 8, pages - 8), (0, 1, 0)]);
    assert_eq!(stamps(device, pages - 8, 8), (0..8).map(|i| Some(11 + 2 * i)).collect::<Vec<_>>());
    device.discard(DevicePage(pages - 1), PageCount::ONE).unwrap();
    assert_eq!(stamps(device, pages - 2, 2), [Some(23), Some(0)]);
}

/// Discarded pages are zeros, their neighbours what they were, and both can be written again.
pub fn discard_reads_as_zeros_and_leaves_neighbours(device: &(impl Device + ?Sized)) {
    capacity(device);
    let mut ram = Ram::new(1024);
    (0..1024).for_each(|i| ram.stamp(i, 2 * i as u64 + 1));
    write(device, &ram, &[(0, 1024, 256)]);
    let mut expected: Vec<_> = (0..1024).map(|i| Some(2 * i + 1)).collect();
    for (page, pages) in [(0_usize, 1), (7, 1), (100, 33), (512, 512)] {
        device.discard(DevicePage(256 + page as u64), PageCount::new(pages)).unwrap();
        expected[page..page + pages].fill(Some(0));
    }
    assert_eq!(stamps(device, 256, 1024), expected);
    write(device, &ram, &[(3, 2, 256 + 107)]);
    expected[107..109].copy_from_slice(&[Some(7), Some(9)]);
    assert_eq!(stamps(device, 256, 1024), expected);
}

/// Eight threads, each on pages of its own, batches and single pages, all at once.
pub fn transfers_from_many_threads(device: &(impl Device + ?Sized)) {
    let share = capacity(device).min(1 << 14) / 8;
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                let random = Random::new(thread as u64);
                let base = (thread * share) as u64;
                let mut ram = Ram::new(share);
                let mut model = vec![0; share];
                for _ in 0..30 {
                    let count = 1 + random.below(32);
                    let mut list = Vec::new();
                    for i in 0..count {
                        let page = i * (share / count) + random.below(share / count);
                        model[page] = random.stamp();
                        ram.stamp(page, model[page]);
                        list.push((page, 1, base + page as u64));
                    }
                    write(device, &ram, &list);
                    list.iter().for_each(|&(page, ..)| ram.stamp(page, 0xdead));
                    read(device, &ram, &list);
                    list.iter().for_each(|&(page, ..)| assert_eq!(ram.stamp_of(page), Some(model[page])));
                }
            });
        }
    });
}

/// Pages that the device does not have fail their own transfer and no other, and never panic.
pub fn failed_transfer_reports_and_others_complete(device: &(impl Device + ?Sized)) {
    let pages = capacity(device) as u64;
    let mut ram = Ram::new(8);
    (0..8).for_each(|i| ram.stamp(i, 2 * i as u64 + 1));
    let list = [(0, 1, 10), (1, 1, pages), (2, 2, pages - 1), (4, 1, u64::MAX), (5, 1, 11), (6, 2, 12)];
    let outcomes = |batch: &[Transfer]| batch.iter().map(|t| t.outcome().is_ok()).collect::<Vec<_>>();
    let expected = [true, false, false, false, true, true];
    let mut writes = batch(&ram, &list);
    device.write(&mut writes);
    assert_eq!(outcomes(&writes), expected);
    let target = Ram::new(8);
    let mut reads = batch(&target, &list);
    device.read(&mut reads);
    assert_eq!(outcomes(&reads), expected);
    let read_back: Vec<_> = (0..8).map(|i| target.stamp_of(i)).collect();
    assert_eq!([read_back[0], read_back[5], read_back[6], read_back[7]], [1, 11, 13, 15].map(Some));
    for single in [pages, u64::MAX, u64::MAX / 4096] {
        let mut alone = batch(&target, &[(0, 1, single)]);
        device.read(&mut alone);
        assert!(alone[0].outcome().is_err(), "page {single}");
    }
    let refused: Result<(), TransferError> = device.discard(DevicePage(pages - 1), PageCount::new(2));
    assert!(refused.is_err());
    assert!(device.discard(DevicePage(u64::MAX), PageCount::ONE).is_err());
}

/// 2 MiB pages, whole, alone and several at once, and one transfer of 8 MiB.
pub fn huge_pages_in_one_transfer(device: &(impl Device + ?Sized)) {
    capacity(device);
    let mut ram = Ram::new(2048);
    (0..2048).for_each(|i| ram.stamp(i, 2 * i as u64 + 1));
    write(device, &ram, &[(0, 512, 512)]);
    assert_eq!(stamps(device, 512, 512), (0..512).map(|i| Some(2 * i + 1)).collect::<Vec<_>>());
    write(device, &ram, &[(512, 512, 0), (1024, 512, 1024), (1536, 512, 2048)]);
    assert_eq!(stamps(device, 2048, 512), (1536..2048).map(|i| Some(2 * i + 1)).collect::<Vec<_>>());
    write(device, &ram, &[(0, 2048, 1024)]);
    assert_eq!(stamps(device, 1024, 2048), (0..2048).map(|i| Some(2 * i + 1)).collect::<Vec<_>>());
}

/// 512 transfers in one batch, back to front.
pub fn more_transfers_than_any_queue(device: &(impl Device + ?Sized)) {
    capacity(device);
    let mut ram = Ram::new(512);
    (0..512).for_each(|i| ram.stamp(i, 2 * i as u64 + 1));
    let list: Vec<_> = (0..512).rev().map(|i| (i, 1, 700 + i as u64)).collect();
    write(device, &ram, &list);
    assert_eq!(stamps(device, 700, 512), (0..512).map(|i| Some(2 * i + 1)).collect::<Vec<_>>());
}

/// Empty batches and empty transfers do nothing and do not fail.
pub fn nothing_to_do_is_fine(device: &(impl Device + ?Sized)) {
    let ram = Ram::new(1);
    device.read(&mut []);
    device.write(&mut []);
    write(device, &ram, &[(0, 0, 5)]);
    read(device, &ram, &[(0, 0, 5), (0, 0, capacity(device) as u64)]);
    assert_eq!(device.discard(DevicePage(5), PageCount::ZERO), Ok(()));
}
