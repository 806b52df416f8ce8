//! Files, by the kernel's rules in `fs/dax.c` and `fs/xfs/xfs_file.c`, and by ndctl's `test/mmap.c`.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Bed, Under, readable};
use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::device::Protection;
use uhmm_dax::file::{FileError, FsError, Interrupt};
use uhmm_dax::store::{Mode, Store};
use uhmm_dax::{DaxFile, FileMapping, FileSystem, Patience};
use uhmm_sys::hugetlb::Huge;

const LONG: Patience = Patience::of(Duration::from_secs(20));
const NOT: Patience = Patience::of(Duration::ZERO);

/// Does `case` for every kind of namespace.
fn matrix(case: impl Fn(&Bed, &FileSystem)) {
    for (under, align, size) in [
        (Under::Memory, Geometry::K4, ByteSize::mib(8)),
        (Under::Memory, Geometry::M2, ByteSize::mib(64)),
        (Under::Huge(Huge::M2), Geometry::M2, ByteSize::mib(64)),
        (Under::File, Geometry::K4, ByteSize::mib(8)),
    ] {
        let Some(bed) = Bed::new(under, size, align, Mode::FsDax) else { continue };
        println!("{under:?}, {align}");
        let files = FileSystem::open(&bed.store, bed.id).unwrap();
        assert_eq!(files.block(), align.bytes() as u64);
        case(&bed, &files);
    }
}

fn read(mapping: &FileMapping, at: usize) -> u8 {
    assert!(at < mapping.len());
    // SAFETY: inside the mapping.
    unsafe { mapping.as_ptr().add(at).read_volatile() }
}

fn write(mapping: &FileMapping, at: usize, value: u8) {
    assert!(at < mapping.len());
    // SAFETY: inside the mapping, which the tests that call this have for writing.
    unsafe { mapping.as_ptr().add(at).write_volatile(value) }
}

fn there(mapping: &FileMapping, at: usize) -> bool {
    assert!(at < mapping.len());
    readable(mapping.as_ptr().as_ptr().wrapping_add(at))
}

fn all(file: &DaxFile) -> Vec<u8> {
    let mut bytes = vec![1; file.size().unwrap() as usize + 1];
    let len = file.read_at(0, &mut bytes).unwrap();
    assert_eq!(len + 1, bytes.len());
    bytes.truncate(len);
    bytes
}

#[test]
fn files_are_as_long_and_hold_what_was_written() {
    matrix(|bed, files| {
        let block = files.block() as usize;
        let free = files.free();
        let file = files.create("a").unwrap();
        let mut model = Vec::new();
        let mut state = 9_u64;
        for n in 0..60 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (at, len) = ((state >> 33) as usize % (3 * block), (state >> 45) as usize % block + 1);
            match n % 4 {
                0 | 1 => {
                    file.write_at(at as u64, &vec![n as u8 + 1; len]).unwrap();
                    model.resize(model.len().max(at + len), 0);
                    model[at..at + len].fill(n as u8 + 1);
                }
                2 => {
                    file.truncate(at as u64, &NOT).unwrap();
                    model.resize(at, 0);
                }
                _ => {
                    let len = 2 * len;
                    file.punch_hole(at as u64, len as u64, &NOT).unwrap();
                    let end = (at + len).min(model.len());
                    model[at.min(end)..end].fill(0);
                }
            }
            assert!(all(&file) == model, "after {n}");
        }
        drop(file);
        let again = files.file_named("a").unwrap();
        assert!(all(&again) == model);
        files.remove("a", &NOT).unwrap();
        assert!(matches!(again.size(), Err(FileError::Unknown { .. })));
        assert_eq!(files.free(), free, "every block is free again");
        assert!(bed.store.destroy(bed.id).is_err(), "the namespace is in use");
    });
}

#[test]
fn files_outlive_their_process() {
    let bed = Bed::new(Under::File, ByteSize::mib(8), Geometry::K4, Mode::FsDax).unwrap();
    let files = FileSystem::open(&bed.store, bed.id).unwrap();
    assert!(matches!(FileSystem::open(&bed.store, bed.id), Err(FsError::InUse { .. })));
    files.create("one").unwrap().write_at(5000, b"hello").unwrap();
    files.file_named("one").unwrap().reflink("two", &NOT).unwrap();
    let free = files.free();
    drop(files);
    let store = std::sync::Arc::new(Store::open(bed.store.medium().path().unwrap()).unwrap());
    let files = FileSystem::open(&store, bed.id).unwrap();
    assert_eq!((files.list(), files.free()), (vec!["one".to_owned(), "two".to_owned()], free));
    assert_eq!(&all(&files.file_named("two").unwrap())[5000..], b"hello");
    files.file_named("two").unwrap().write_at(5000, b"H").unwrap();
    assert_eq!(&all(&files.file_named("one").unwrap())[5000..], b"hello", "what was shared is copied");
}

#[test]
fn mappings_and_calls_see_one_file() {
    matrix(|_, files| {
        let block = files.block();
        let file = files.create("f").unwrap();
        file.truncate(2 * block + 100, &NOT).unwrap();
        assert_eq!(file.allocated().unwrap(), 0, "a hole takes nothing");
        let mapping = file.map(0, 4 * block, Protection::ReadWrite).unwrap();
        assert!(mapping.range().start().is_aligned_to(block as usize));
        assert_eq!(file.allocated().unwrap(), 3 * block, "what is mapped is there");
        write(&mapping, block as usize + 7, 5);
        mapping.flush(block as usize + 7, 1).unwrap();
        let mut byte = [0];
        file.read_at(block + 7, &mut byte).unwrap();
        assert_eq!(byte, [5]);
        file.write_at(2 * block, &[6]).unwrap();
        assert_eq!(read(&mapping, 2 * block as usize), 6);
        assert!(!there(&mapping, 3 * block as usize), "behind the end");
        file.write_at(3 * block, &[8]).unwrap();
        assert_eq!(read(&mapping, 3 * block as usize), 8, "the file has grown into the mapping");
        file.punch_hole(block, block, &NOT).unwrap();
        assert_eq!(read(&mapping, block as usize + 7), 0);
        write(&mapping, block as usize, 3);
        assert_eq!(all(&file)[block as usize], 3, "and is still shared with the file");
        file.truncate(block, &NOT).unwrap();
        assert!(there(&mapping, 0) && !there(&mapping, block as usize));
        files.remove("f", &NOT).unwrap();
        assert!(!there(&mapping, 0));
    });
}

#[test]
fn a_reflink_shares_until_one_writes() {
    matrix(|_, files| {
        let block = files.block();
        let source = files.create("source").unwrap();
        source.write_at(0, &vec![1; 2 * block as usize]).unwrap();
        let free = files.free().bytes();
        let copy = source.reflink("copy", &NOT).unwrap();
        assert_eq!(files.free().bytes(), free, "nothing was copied");
        let seen = source.map(0, 2 * block, Protection::Read).unwrap();
        copy.write_at(block, &[2]).unwrap();
        assert_eq!(files.free().bytes(), free - block, "one block was");
        assert_eq!((read(&seen, block as usize), all(&copy)[block as usize]), (1, 2));
        source.write_at(0, &[3]).unwrap();
        assert_eq!((read(&seen, 0), all(&copy)[0]), (3, 1), "a mapping follows its file");
        let mapped = source.map(0, 2 * block, Protection::ReadWrite).unwrap();
        let third = source.reflink("third", &NOT).unwrap();
        write(&mapped, 1, 9);
        assert_eq!((all(&third)[1], all(&source)[1]), (1, 9), "what is mapped for writing is its own");
        let whole = [&source, &copy, &third].map(all);
        files.remove("source", &NOT).unwrap();
        assert!(all(&copy) == whole[1] && all(&third) == whole[2]);
        files.remove("copy", &NOT).unwrap();
        files.remove("third", &NOT).unwrap();
    });
}

#[test]
fn a_large_file_that_is_mapped_is_reflinked_block_by_block_in_one_pass() {
    // 32768 blocks; were each looked for among all the others, that would be 10^9 steps.
    let size = ByteSize::mib(128);
    let Some(bed) = Bed::new(Under::Memory, ByteSize::mib(320), Geometry::K4, Mode::FsDax) else { return };
    let files = FileSystem::open(&bed.store, bed.id).unwrap();
    let file = files.create("a").unwrap();
    file.truncate(size.bytes(), &NOT).unwrap();
    let mapping = file.map(0, size.bytes(), Protection::ReadWrite).unwrap();
    write(&mapping, 5, 7);
    let free = files.free().bytes();
    let copy = file.reflink("b", &NOT).unwrap();
    assert_eq!(files.free().bytes(), free - size.bytes(), "what is mapped for writing is copied");
    drop(mapping);
    copy.reflink("c", &NOT).unwrap();
    assert_eq!(files.free().bytes(), free - size.bytes(), "and nothing else");
    files.remove("b", &NOT).unwrap();
    let mut byte = [0];
    files.file_named("c").unwrap().read_at(5, &mut byte).unwrap();
    assert_eq!(byte, [7]);
    let loss = files.file_named("c").unwrap().inject_error(4096, 4096).unwrap();
    assert_eq!(loss.files, [("c".to_owned(), 4096, 4096)], "whose they are is known");
}

#[test]
fn a_pin_keeps_the_files_from_others_and_a_cut_from_its_block() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(8), Geometry::K4, Mode::FsDax).unwrap();
    let files = FileSystem::open(&bed.store, bed.id).unwrap();
    let file = files.create("a").unwrap();
    file.write_at(0, &[1; 8192]).unwrap();
    let pinned = file.pin(0, 1, true).unwrap();
    assert!(matches!(file.truncate(100, &NOT), Err(FileError::Busy { offset: 0, .. })));
    file.truncate(4096, &NOT).unwrap();
    drop((files, file));
    assert!(matches!(FileSystem::open(&bed.store, bed.id), Err(FsError::InUse { .. })));
    drop(pinned);
}

#[test]
fn truncate_and_punch_wait_for_pins() {
    matrix(|_, files| {
        let block = files.block();
        let file = files.create("f").unwrap();
        file.write_at(0, &vec![4; 3 * block as usize]).unwrap();
        let pinned = file.pin(block, 1, true).unwrap();
        for refused in [file.truncate(0, &NOT), file.punch_hole(0, 3 * block, &NOT), files.remove("f", &NOT)]
        {
            assert!(matches!(refused, Err(FileError::Busy { references: 1, .. })), "{refused:?}");
        }
        assert!(file.reflink("g", &NOT).is_err(), "a transfer would write to both");
        assert_eq!(all(&file), vec![4; 3 * block as usize], "nothing happened");
        file.truncate(2 * block, &NOT).unwrap();
        file.punch_hole(0, block, &NOT).unwrap();
        let interrupt = Interrupt::default();
        let patience = Patience { interrupt: Some(interrupt.clone()), ..LONG };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| file.truncate(0, &patience));
            std::thread::sleep(Duration::from_millis(5));
            interrupt.raise();
            let told = waiting.join().unwrap();
            assert!(matches!(told, Err(FileError::Interrupted { offset }) if offset == block), "{told:?}");
            let waiting = scope.spawn(|| file.truncate(0, &LONG));
            std::thread::sleep(Duration::from_millis(5));
            assert!(!waiting.is_finished());
            drop(pinned);
            waiting.join().unwrap().unwrap();
        });
        assert_eq!((file.size().unwrap(), file.allocated().unwrap()), (0, 0));
        files.remove("f", &NOT).unwrap();
    });
}

#[test]
fn poison_says_which_files_and_writing_whole_pages_mends_it() {
    matrix(|bed, files| {
        let block = files.block();
        let file = files.create("f").unwrap();
        file.write_at(0, &vec![4; 2 * block as usize]).unwrap();
        let mapping = file.map(0, 2 * block, Protection::Read).unwrap();
        let other = file.reflink("g", &NOT).unwrap();
        let loss = file.inject_error(block, 4096).unwrap();
        assert_eq!((loss.pages.size().bytes(), loss.mappings), (block, 1));
        let mut names = loss.files.clone();
        names.sort();
        assert_eq!(names, [("f".to_owned(), block, block), ("g".to_owned(), block, block)]);
        assert!(there(&mapping, 0) && !there(&mapping, block as usize));
        for file in [&file, &other] {
            let told = file.read_at(block, &mut [0]).unwrap_err();
            assert!(matches!(told, FileError::Poisoned { offset } if offset == block), "{told}");
            assert_eq!(file.read_at(0, &mut [0]).unwrap(), 1);
        }
        let told = file.write_at(block + 1, &[0; 100]).unwrap_err();
        assert!(matches!(told, FileError::Poisoned { .. }), "{told}");
        file.write_at(block, &[7; 4096]).unwrap();
        assert_eq!(read(&mapping, block as usize), 7);
        assert!(bed.store.table().unwrap().bad().runs().is_empty());
        file.inject_error(0, 4096).unwrap();
        files.remove("f", &NOT).unwrap();
        files.remove("g", &NOT).unwrap();
        let next = files.create("next").unwrap();
        next.write_at(0, &[1; 4096]).unwrap();
        assert_eq!(all(&next)[0], 1, "a bad block is given to nobody");
    });
}

#[test]
fn what_cannot_be_is_refused_with_its_values() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(2), Geometry::K4, Mode::FsDax).unwrap();
    let files = FileSystem::open(&bed.store, bed.id).unwrap();
    let file = files.create("f").unwrap();
    assert!(matches!(files.create("f"), Err(FileError::Exists { .. })));
    assert!(matches!(files.file_named("g"), Err(FileError::Unknown { .. })));
    for name in ["", "a/b", "a\0b", &"x".repeat(256)] {
        assert!(matches!(files.create(name), Err(FileError::Name { .. })));
    }
    assert!(matches!(
        file.map(100, 4096, Protection::Read),
        Err(FileError::Misaligned { what: "offset", .. })
    ));
    assert!(matches!(file.map(0, 0, Protection::Read), Err(FileError::Misaligned { what: "length", .. })));
    assert!(matches!(file.pin(0, 1, false), Err(FileError::Outside { .. })));
    assert!(matches!(file.write_at(u64::MAX, &[1]), Err(FileError::TooLong { .. })));
    assert!(matches!(file.truncate(1 << 60, &NOT), Err(FileError::TooLong { .. })));
    let free = files.free();
    let told = file.write_at(0, &vec![1; 2 << 20]).unwrap_err();
    assert!(matches!(told, FileError::Full { .. }), "{told}");
    assert_eq!((files.free(), file.size().unwrap()), (free, 0), "nothing happened");
    let small = Bed::new(Under::Memory, ByteSize::mib(1), Geometry::K4, Mode::FsDax).unwrap();
    assert!(matches!(FileSystem::open(&small.store, small.id), Err(FsError::TooSmall { .. })));
}

#[test]
fn files_change_hands_under_threads_that_pin_and_touch_them() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(4), Geometry::K4, Mode::FsDax).unwrap();
    let files = FileSystem::open(&bed.store, bed.id).unwrap();
    let (stop, pins) = (AtomicBool::new(false), AtomicU64::new(0));
    let [one, two] = ["one", "two"].map(|name| files.create(name).unwrap());
    std::thread::scope(|scope| {
        for (file, value) in [(&one, 1_u8), (&two, 2)] {
            let (stop, pins) = (&stop, &pins);
            scope.spawn(move || {
                let mapping = file.map(0, 16 * 4096, Protection::ReadWrite).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    file.write_at(0, &[value; 16 * 4096]).unwrap();
                    let Ok(pinned) = file.pin(8192, 4096, true) else { continue };
                    let before = read(&mapping, 8192);
                    // What is pinned is this file's, however often the other one grows and shrinks.
                    assert!(before == value || before == 0, "{before} in the file of {value}");
                    pins.fetch_add(1, Ordering::Relaxed);
                    drop(pinned);
                }
            });
        }
        let deadline = Instant::now() + Duration::from_secs(3);
        while Instant::now() < deadline {
            for file in [&one, &two] {
                file.truncate(0, &LONG).unwrap();
                file.punch_hole(4096, 8192, &LONG).unwrap();
                file.truncate(5 * 4096, &LONG).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(pins.load(Ordering::Relaxed) > 100);
}
