//! Stores in files: what several processes and a kill at any moment leave of them.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::Scratch;
use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::store::{Change, ChangeError, Mode, NamespaceId, OpenError, Spec, Store, Table};

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
    assert!(matches!(Store::create(&path, CAPACITY, 0), Err(OpenError::Io { .. })), "it is there already");
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
