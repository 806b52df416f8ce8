//! Stores in files: what several processes and a kill at any moment leave of them.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::Scratch;
use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::store::{Change, ChangeError, Mode, NamespaceId, OpenError, Spec, Store, Table};
use uhmm_sys::hugetlb::Huge;

const CAPACITY: ByteSize = ByteSize::mib(32);

fn spec(mib: u64) -> Spec {
    Spec { size: Some(ByteSize::mib(mib)), ..Spec::default() }
}

#[test]
fn what_was_created_is_there_when_it_is_opened_again() {
    let scratch = Scratch::new("reopen");
    let path = scratch.file("pmem.img");
    let store = Store::create(&path, CAPACITY, 3).unwrap();
    let id = store.create_namespace(&Spec { mode: Mode::FsDax, name: "logs".into(), ..spec(8) }).unwrap();
    store.mark(id, 4096, 8192, true).unwrap();
    let table = store.table().unwrap();
    drop(store);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.table().unwrap(), table);
    assert_eq!((table.device_name(id), store.complaint()), ("dax3.0".to_owned(), None));
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap());
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_file_that_is_no_store_stays_as_it_is() {
    let scratch = Scratch::new("foreign");
    let path = scratch.file("letters");
    std::fs::write(&path, vec![b'x'; 4 << 20]).unwrap();
    assert!(matches!(Store::open(&path), Err(OpenError::NoStore { .. })));
    assert!(
        matches!(Store::create(&path, CAPACITY, 0), Err(OpenError::Exists { .. })),
        "it is there already"
    );
    assert_eq!(std::fs::read(&path).unwrap(), vec![b'x'; 4 << 20]);
    assert!(matches!(Store::open(&scratch.file("none")), Err(OpenError::Missing { .. })));
    assert!(matches!(Store::open(Path::new("/dev/null")), Err(OpenError::NotAFile { .. })));
    std::fs::write(&path, b"short").unwrap();
    assert!(matches!(Store::open(&path), Err(OpenError::TooSmall { size: 5, .. })));
    assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 1, "nothing is left of what failed");
}

#[test]
fn a_namespace_that_is_used_is_not_changed() {
    let scratch = Scratch::new("busy");
    let path = scratch.file("pmem.img");
    let store = Store::create(&path, CAPACITY, 0).unwrap();
    let id = store.create_namespace(&spec(8)).unwrap();
    let claim = store.claim(id).unwrap();
    let also = store.claim(id).unwrap();
    assert_eq!((claim.device_name(), claim.namespace()), ("dax0.0", also.namespace()));
    let other = Store::open(&path).unwrap();
    for refused in [
        other.destroy(id),
        store.resize(id, ByteSize::mib(16)),
        other.reconfigure(id, &Change { mode: Some(Mode::FsDax), ..Change::default() }),
    ] {
        let Err(ChangeError::Busy { device, holders }) = refused else { panic!("{refused:?}") };
        assert_eq!(device, "dax0.0");
        assert_eq!(holders.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [std::process::id()]);
    }
    let second = other.create_namespace(&spec(8)).unwrap();
    other.destroy(second).unwrap();
    drop(claim);
    assert!(matches!(other.destroy(id), Err(ChangeError::Busy { .. })));
    drop(also);
    other.destroy(id).unwrap();
    assert!(matches!(store.claim(id), Err(ChangeError::Table(_))), "the first handle reads the labels anew");
}

#[test]
fn what_belonged_to_another_is_zero() {
    let scratch = Scratch::new("clean");
    let path = scratch.file("pmem.img");
    let store = Store::create(&path, CAPACITY, 0).unwrap();
    let id = store.create_namespace(&spec(8)).unwrap();
    let extent = store.table().unwrap().get(id).unwrap().extents[0];
    let at = store.medium().offset(extent);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let first = || {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, at).unwrap();
        byte[0]
    };
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], at).unwrap();
    store
        .reconfigure(id, &Change { mode: Some(Mode::FsDax), align: Some(Geometry::K4), name: None })
        .unwrap();
    assert_eq!(first(), 7, "a namespace that is reconfigured keeps its bytes");
    let refused = store.resize(id, ByteSize::mib(16));
    assert!(
        matches!(refused, Err(ChangeError::Files { .. })),
        "{refused:?}: where files lie follows from the size"
    );
    store.destroy(id).unwrap();
    store.create_namespace(&spec(8)).unwrap();
    assert_eq!(first(), 0);
}

/// The state after `n` changes, without a file.
fn apply(store: &Store, n: u64) {
    let id = NamespaceId((n % 5) as u32);
    let size = ByteSize::mib(2 * (n % 4 + 1));
    let _ = match n % 7 {
        0..3 => store
            .create_namespace(&Spec { size: Some(size), name: format!("n{n}"), ..Spec::default() })
            .map(drop),
        3 => store.resize(id, size),
        4 => store.mark(id, (n % 50) * 4096, 4096 * (n % 3 + 1), n.is_multiple_of(2)),
        5 => store.destroy(id),
        _ => store.reconfigure(id, &Change { name: Some(format!("r{n}")), ..Change::default() }),
    };
}

/// What two tables have in common where marks are random.
fn plain(table: &Table) -> impl PartialEq + std::fmt::Debug + use<> {
    let all = table.namespaces().iter();
    let all: Vec<_> =
        all.map(|own| (own.id, own.name.clone(), own.mode, own.align, own.extents.clone())).collect();
    (all, table.bad().clone())
}

const CHILD: &str = "UHMM_DAX_CRASH_CHILD";

/// The body of the process that is killed: changes a store, and says each that is done.
#[test]
fn crash_child() {
    let Some(path) = std::env::var_os(CHILD) else { return };
    let store = Store::open(Path::new(&path)).unwrap();
    let mut out = std::io::stdout();
    for n in 0.. {
        apply(&store, n);
        out.write_all(format!("\ndone {n}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn a_kill_leaves_the_state_before_a_change_or_after_it() {
    let deadline = Instant::now() + Duration::from_secs(8);
    let mut kills = 0;
    for round in 0..24 {
        if Instant::now() > deadline {
            break;
        }
        let scratch = Scratch::new("kill");
        let path = scratch.file("pmem.img");
        drop(Store::create(&path, CAPACITY, 0).unwrap());
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["crash_child", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let until = round * 3 + 1;
        let mut done = 0;
        for line in &mut lines {
            if let Some(n) = line.unwrap().strip_prefix("done ") {
                done = n.parse::<u64>().unwrap() + 1;
                if done >= until {
                    break;
                }
            }
        }
        // Somewhere in the changes that follow.
        std::thread::sleep(Duration::from_micros(round * 170));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines {
            if let Some(n) = line.unwrap().strip_prefix("done ") {
                done = n.parse::<u64>().unwrap() + 1;
            }
        }
        let found = plain(&Store::open(&path).unwrap().table().unwrap());
        let model = Store::memory(CAPACITY, None, 0).unwrap();
        (0..done).for_each(|n| apply(&model, n));
        let before = plain(&model.table().unwrap());
        apply(&model, done);
        let after = plain(&model.table().unwrap());
        assert!(found == before || found == after, "after {done} changes: {found:?}");
        kills += 1;
    }
    assert!(kills >= 8, "only {kills} in the time there is");
}

const HOLDER: &str = "UHMM_DAX_HOLDER_CHILD";

/// The body of a process that uses a namespace until it is killed.
#[test]
fn holder_child() {
    let Some(path) = std::env::var_os(HOLDER) else { return };
    let store = Store::open(Path::new(&path)).unwrap();
    let _claim = store.claim(NamespaceId(0)).unwrap();
    println!("\nhas it");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn busy_names_who_has_it_and_not_who_asked() {
    let scratch = Scratch::new("holder");
    let path = scratch.file("pmem.img");
    let (store, id) = Store::create_with(&path, CAPACITY, 0, &spec(8)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["holder_child", "--exact", "--nocapture", "--test-threads=1"])
        .env(HOLDER, &path)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap() == "has it"));
    let told = store.destroy(id).unwrap_err();
    child.kill().unwrap();
    child.wait().unwrap();
    let ChangeError::Busy { holders, .. } = &told else { panic!("{told}") };
    assert_eq!(holders.iter().map(|holder| holder.pid).collect::<Vec<_>>(), [child.id()]);
    store.destroy(id).unwrap();
}

#[test]
fn a_store_is_opened_while_others_change_it() {
    let scratch = Scratch::new("open");
    let path = scratch.file("pmem.img");
    let (store, id) = Store::create_with(&path, CAPACITY, 0, &spec(8)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                // Long labels, so that each write takes its time.
                store.mark(id, n % 512 * 8192, 4096, n % 1024 < 512).unwrap();
            }
        });
        let opened: Vec<_> = (0..200).map(|_| Store::open(&path).map(drop)).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(opened.iter().all(Result::is_ok), "{opened:?}");
    });
}

#[test]
fn of_two_who_create_a_store_one_does_with_its_namespace() {
    let scratch = Scratch::new("create");
    for round in 0..20 {
        let path = scratch.file(&format!("{round}.img"));
        let start = std::sync::Barrier::new(3);
        let made: Vec<_> = std::thread::scope(|scope| {
            let one = |n: u32| {
                let (path, start) = (&path, &start);
                scope.spawn(move || {
                    start.wait();
                    let spec = Spec { name: format!("of {n}"), ..spec(8) };
                    Store::create_with(path, CAPACITY, n, &spec).map(|_| n)
                })
            };
            let all: Vec<_> = (0..3).map(one).collect();
            all.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let won: Vec<u32> = made.iter().filter_map(|made| made.as_ref().ok().copied()).collect();
        assert_eq!(won.len(), 1, "{made:?}");
        let lost = made.iter().filter_map(|made| made.as_ref().err());
        assert!(lost.clone().all(|error| matches!(error, OpenError::Exists { .. })), "{made:?}");
        let table = Store::open(&path).unwrap().table().unwrap();
        assert_eq!((table.region, table.namespaces().len()), (won[0], 1));
        assert_eq!(table.namespaces()[0].name, format!("of {}", won[0]));
        assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), round + 1, "and nothing else is left");
    }
    let refused = Store::create_with(
        &scratch.file("odd"),
        CAPACITY,
        0,
        &Spec { size: Some(ByteSize::new(1)), ..spec(1) },
    );
    assert!(matches!(refused, Err(OpenError::Table(_))), "{refused:?}");
    assert!(!scratch.file("odd").exists());
}

#[test]
fn what_a_kill_left_of_a_store_is_removed() {
    let scratch = Scratch::new("left");
    let path = scratch.file("pmem.img");
    let names = [".pmem.img.new-7", ".pmem.img.new-x", ".other.img.new-7", ".pmem.img.new-8"];
    names.iter().for_each(|name| std::fs::write(scratch.file(name), b"x").unwrap());
    // One of them is somebody's who is still about it.
    let alive = std::fs::OpenOptions::new().read(true).write(true).open(scratch.file(names[3])).unwrap();
    let lock =
        uhmm_sys::filelock::FileLock::try_acquire(alive.into(), 0, uhmm_sys::filelock::Kind::Exclusive)
            .unwrap();
    drop(Store::create(&path, CAPACITY, 0).unwrap());
    let mut left: Vec<_> =
        std::fs::read_dir(&scratch.0).unwrap().map(|file| file.unwrap().file_name()).collect();
    left.sort_unstable();
    assert_eq!(left, [names[2], names[3], names[1], "pmem.img"]);
    drop(lock);
}

#[test]
fn a_name_is_one_line() {
    let store = Store::memory(CAPACITY, None, 0).unwrap();
    let id = store.create_namespace(&spec(8)).unwrap();
    for name in ["a\nb", "\x1b[2J", "\u{85}", "\0"] {
        let told = store.create_namespace(&Spec { name: name.into(), ..spec(8) }).unwrap_err().to_string();
        assert!(told.contains("has control characters") && !told.contains(name), "{told}");
        let change = Change { name: Some(name.into()), ..Change::default() };
        assert!(store.reconfigure(id, &change).is_err());
    }
}

#[test]
fn files_keep_the_alignment_of_their_namespace() {
    let store = Store::memory(CAPACITY, None, 0).unwrap();
    let id = store.create_namespace(&Spec { mode: Mode::FsDax, ..spec(8) }).unwrap();
    let align = |align, mode| store.reconfigure(id, &Change { align: Some(align), mode, name: None });
    for mode in [None, Some(Mode::FsDax)] {
        let told = align(Geometry::K4, mode).unwrap_err().to_string();
        assert!(told.contains("holds files in blocks of 2M"), "{told}");
        align(Geometry::M2, mode).unwrap();
    }
    align(Geometry::K4, Some(Mode::DevDax)).unwrap();
}

#[test]
fn a_mount_with_too_few_huge_pages_is_told_from_a_pool() {
    let Some(_pages) = common::HugePages::reserve(Huge::M2, 6) else { return };
    let scratch = Scratch::new("mount");
    let mount =
        |args: &[&str]| Command::new("mount").args(args).arg(&scratch.0).stderr(Stdio::null()).status();
    let mounted = mount(&["-t", "hugetlbfs", "-o", "pagesize=2M,size=4M", "uhmm-test"]);
    if !mounted.is_ok_and(|status| status.success()) {
        return println!("skipped: no file system of huge pages can be mounted here");
    }
    let told = Store::create(&scratch.file("pmem.img"), ByteSize::mib(8), 0).unwrap_err().to_string();
    let left = std::fs::read_dir(&scratch.0).unwrap().count();
    Command::new("umount").arg(&scratch.0).status().unwrap();
    assert_eq!(left, 0);
    assert!(told.starts_with("5 huge pages of 2M are needed for "), "{told}");
    assert!(told.contains("a limit of 2, of which 2 are free; mount it with size=10 MiB"), "{told}");
}
