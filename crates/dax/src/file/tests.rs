//! The table of files at every step of every write, and the protocol of pages under real threads.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use uhmm_addr::{Geometry, PageCount, PfnRange};
use uhmm_core::device::MemoryType;
use uhmm_core::pagemap::Pagemap;

use super::backend::Backend;
use super::layout::{self, Waiting};
use super::meta::{Meta, MetaError, Record};
use super::runs::{Run, Runs};
use super::*;
use crate::machine::{Region, machine};
use crate::store::Area;

const ROOM: u64 = 1 << 20;

/// What happened to an area.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Sync,
}

/// An area in memory that notes what happens to it.
#[derive(Debug)]
struct Noted {
    bytes: Mutex<Vec<u8>>,
    steps: Mutex<Vec<Step>>,
}

impl Noted {
    fn over(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self { bytes: Mutex::new(bytes), steps: Mutex::default() })
    }
}

impl Area for Noted {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.bytes.lock().unwrap()[at as usize..][..into.len()]);
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.bytes.lock().unwrap()[at as usize..][..bytes.len()].copy_from_slice(bytes);
        self.steps.lock().unwrap().push(Step::Write(at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.steps.lock().unwrap().push(Step::Sync);
        Ok(())
    }
}

type Contents = BTreeMap<String, (u64, u64, Vec<(u64, u64, u64)>)>;

fn contents(meta: &Meta) -> Contents {
    let files = meta.files().unwrap().into_iter();
    let plain = |record: Record| record.runs.iter().map(|run| (run.at, run.block, run.len)).collect();
    files.map(|(name, inode, record)| (name, (inode, record.size, plain(record)))).collect()
}

fn open(area: Arc<dyn Area>) -> Meta {
    Meta::open(Backend::open(area, ROOM, Geometry::K4).unwrap()).unwrap()
}

fn change(meta: &Meta, n: u64) {
    let name = format!("file {}", n % 5);
    let inode = n % 5 + 1;
    let exists = contents(meta).contains_key(&name);
    let runs = (0..n % 4).map(|k| Run { at: 10 * k, block: 100 * n + 7 * k, len: k + 1 }).collect();
    let record = Record { size: n * 1000, runs: Runs::checked(runs).unwrap() };
    match n % 3 {
        _ if !exists => meta.create(&name, inode, &record).unwrap(),
        0 => meta.remove(&name, inode).unwrap(),
        _ => meta.update(inode, &record).unwrap(),
    }
}

#[test]
fn a_crash_at_any_write_leaves_the_old_files_or_the_new_ones() {
    const SECTOR: usize = 512;
    let mut state = 5_u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut image = vec![0; ROOM as usize];
    let mut crashes = 0;
    for n in 0..40 {
        let area = Noted::over(image.clone());
        let meta = open(area.clone());
        let (before, start) = (contents(&meta), area.bytes.lock().unwrap().clone());
        area.steps.lock().unwrap().clear();
        change(&meta, n);
        let steps = area.steps.lock().unwrap().clone();
        let after = contents(&meta);
        let mut writes = 0;
        for end in 0..=steps.len() {
            // What was synced is there; of what came after, any sectors.
            let synced =
                steps[..end].iter().rposition(|step| matches!(step, Step::Sync)).map_or(0, |at| at + 1);
            let mut crashed = start.clone();
            for (at, step) in steps[..end].iter().enumerate() {
                let Step::Write(offset, bytes) = step else { continue };
                writes += usize::from(end == steps.len());
                for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                    if at < synced || random() % 3 > 0 {
                        crashed[*offset as usize + n * SECTOR..][..sector.len()].copy_from_slice(sector);
                    }
                }
            }
            let found = contents(&open(Noted::over(crashed)));
            assert!(
                found == before || found == after,
                "change {n}, after {end} of {} steps: {found:?}",
                steps.len()
            );
            crashes += 1;
        }
        assert!(writes > 0);
        image = area.bytes.lock().unwrap().clone();
        drop(meta);
        // Closed in order, or not at all.
        if n % 2 == 0 {
            image = area.bytes.lock().unwrap().clone();
        }
    }
    assert!(crashes > 200, "{crashes}");
}

#[test]
fn a_header_that_is_none_is_not_written_over() {
    let area = Noted::over(vec![0; ROOM as usize]);
    drop(open(area.clone()));
    let good = area.bytes.lock().unwrap().clone();
    let refused = |change: fn(&mut Vec<u8>), align| {
        let mut bytes = good.clone();
        change(&mut bytes);
        let area = Noted::over(bytes.clone());
        let told = Backend::open(area.clone(), ROOM, align).unwrap_err().to_string();
        assert!(*area.bytes.lock().unwrap() == bytes);
        told
    };
    let told = refused(|bytes| bytes[20] ^= 1, Geometry::K4);
    assert!(told.contains("nothing was changed"), "{told}");
    let told = refused(|bytes| bytes[..512].fill(0), Geometry::K4);
    assert!(told.contains("its header is blank"), "{told}");
    let told = refused(|_| (), Geometry::M2);
    assert!(told.contains("blocks of 4096 bytes, and the namespace is aligned to 2M"), "{told}");
    let newer = |bytes: &mut Vec<u8>| {
        bytes[8] = 2;
        let sum = crc32fast::hash(&bytes[..28]).to_le_bytes();
        bytes[28..32].copy_from_slice(&sum);
    };
    assert!(refused(newer, Geometry::K4).contains("version 2"));
}

#[test]
fn a_table_that_is_full_says_so_and_goes_on() {
    let area = Noted::over(vec![0; ROOM as usize]);
    let meta = open(area.clone());
    let name = |n: u64| format!("{n:0200}");
    let mut made = 0;
    for round in 0..5 {
        // Opened anew, it may have room for one more.
        let told = loop {
            match meta.create(&name(made), made + 1, &Record::default()) {
                Ok(()) => made += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(told, MetaError::Full { room } if room.bytes() == ROOM - 4096), "{told}");
        assert!(made > 500, "{made}");
        assert_eq!(contents(&meta).len() as u64, made, "round {round}: what was refused has not happened");
        meta.update(1, &Record { size: round, ..Record::default() }).unwrap();
        assert_eq!(contents(&meta)[&name(0)].1, round);
    }
    for n in 0..made {
        meta.remove(&name(n), n + 1).unwrap();
    }
    meta.create(&name(made), made + 1, &Record::default()).unwrap();
    drop(meta);
    let after = area.bytes.lock().unwrap().clone();
    assert_eq!(contents(&open(Noted::over(after))).into_keys().collect::<Vec<_>>(), [name(made)]);
}

#[test]
fn a_table_full_of_files_in_pieces_can_be_emptied() {
    let area = Noted::over(vec![0; ROOM as usize]);
    let meta = open(area.clone());
    let pieces = |n: u64| (0..n).map(|k| Run { at: 2 * k, block: 300 + 2 * k, len: 1 }).collect();
    let record = |n| Record { size: 1, runs: Runs::checked(pieces(n)).unwrap() };
    // Many files in one piece or a few, and fewer in many.
    for pieces in [1, 37, 1, 900, 37] {
        let mut made = 0;
        let full = loop {
            match meta.create(&format!("file {made}"), made + 1, &record(made * pieces % 901)) {
                Ok(()) => made += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(full, MetaError::Full { room } if room.bytes() == ROOM - 4096), "{full}");
        let before = contents(&meta);
        assert_eq!(before.len() as u64, made, "nothing happened");
        assert!(meta.create("another", made + 1, &record(900)).is_err());
        assert_eq!(contents(&open(Noted::over(area.bytes.lock().unwrap().clone()))), before);
        for n in 0..made {
            meta.remove(&format!("file {n}"), n + 1).unwrap_or_else(|why| panic!("{n} of {made}: {why}"));
        }
        assert!(contents(&meta).is_empty());
    }
}

#[test]
fn records_that_no_file_can_have_are_refused() {
    let end = SIZE_MAX / 4096;
    let record = |size, at| Record { size, runs: Runs::checked(vec![Run { at, block: 1, len: 1 }]).unwrap() };
    for (inode, record, fine) in [
        (1, record(SIZE_MAX, end - 1), true),
        (1, record(SIZE_MAX + 1, 0), false),
        (1, record(0, end), false),
        (u64::MAX, record(0, 0), false),
    ] {
        let meta = open(Noted::over(vec![0; ROOM as usize]));
        meta.create("a", inode, &record).unwrap();
        assert_eq!(meta.files().is_ok(), fine, "{inode} {record:?}");
    }
}

#[test]
fn blocks_on_persistent_memory_are_mapped_so_that_a_flush_is_enough() {
    // The kernel refuses the flag for this file, which shows that it was asked.
    let source = Source::not_persistent(4 << 20);
    let lock = filelock::reopened(std::os::fd::AsFd::as_fd(&source.file)).unwrap();
    let lock = FileLock::try_acquire(lock, 0, filelock::Kind::Exclusive).unwrap();
    match Blocks::new(source, Arc::new(Driver::default()), lock) {
        Err(crate::device::DeviceError::Io { error, .. }) => {
            assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()));
        }
        other => panic!("{other:?}"),
    }
}

/// Pages that are given to another as soon as nobody refers to them, and threads that refer to them: none finds a page
/// that changes while he has it.
#[test]
fn no_page_is_given_away_while_it_is_referred_to() {
    const PAGES: usize = 16;
    const ROUNDS: u64 = 1_000_000;
    const LEAST: u64 = 200_000;
    let region = Region::request(&[512], Geometry::K4, "truncate").unwrap();
    let driver = Arc::new(Driver::default());
    let builder = Pagemap::builder("truncate", MemoryType::FsDax).ops(driver.clone()).range(region.ranges[0]);
    let map = machine().register(builder).unwrap();
    let page = |n: usize| PfnRange::new(region.ranges[0].start.forward(PageCount::new(n)), PageCount::ONE);
    // Whose each page is; odd while it is being given to another.
    let owners: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let (stop, seen, mut rounds) = (AtomicBool::new(false), AtomicU64::new(0), 0);
    let patience = Patience::of(std::time::Duration::from_secs(60));
    std::thread::scope(|scope| {
        for thread in 0..2_usize {
            let (map, owners, stop, seen, page) = (&map, &owners, &stop, &seen, &page);
            scope.spawn(move || {
                let mut n = thread * 7;
                while !stop.load(Ordering::Relaxed) {
                    n = (n * 5 + 1) % PAGES;
                    // A fault, or a pin: both are a reference for a while.
                    let Ok(held) = map.pin(page(n)) else { continue };
                    let first = owners[n].load(Ordering::SeqCst);
                    assert!(first.is_multiple_of(2), "a page that is just being given away was had");
                    std::hint::spin_loop();
                    assert_eq!(
                        owners[n].load(Ordering::SeqCst),
                        first,
                        "given away while it was referred to"
                    );
                    seen.fetch_add(1, Ordering::Relaxed);
                    drop(held);
                }
            });
        }
        let mut n = 0;
        // A round is a page given away, or one that was had by who refers to it.
        while rounds < LEAST || rounds + seen.load(Ordering::Relaxed) < ROUNDS {
            rounds += 1;
            n = (n + 3) % PAGES;
            let waiting = Waiting::begin(&patience);
            loop {
                let turn = driver.turn.now();
                match layout::claim(&map, &[page(n)]) {
                    Ok(claims) => {
                        owners[n].fetch_add(1, Ordering::SeqCst);
                        owners[n].fetch_add(1, Ordering::SeqCst);
                        drop(claims);
                        break;
                    }
                    Err(_) => assert!(waiting.go_on(&driver.turn, turn).is_ok(), "page {n} never came free"),
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(seen.load(Ordering::Relaxed) > 1000);
    machine().unregister(&map, &mut |_| true).unwrap();
}
