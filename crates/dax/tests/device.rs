//! Devices, by the cases of ndctl's `test/device-dax.c`, `test/dax-poison.c` and `test/daxdev-errors.c`, and by the
//! kernel's rules in `drivers/dax/device.c`.

mod common;

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Bed, Scratch, Under, alone, readable};
use rustix::fs::{Mode as FileMode, OFlags};
use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::device::{AccessError, KillError, MapError, MapOptions, PinError, Protection};
use uhmm_dax::store::{Mode, Spec, Store};
use uhmm_dax::{DaxMapping, Device, Faults};
use uhmm_sys::hugetlb::Huge;

/// A device of two compound pages (four of 2M, sixty-four of 4K), in each way in which it can be had.
const MATRIX: [(Under, Geometry); 6] = [
    (Under::Memory, Geometry::K4),
    (Under::Memory, Geometry::M2),
    (Under::Huge(Huge::M2), Geometry::M2),
    (Under::Huge(Huge::G1), Geometry::G1),
    (Under::File, Geometry::K4),
    (Under::File, Geometry::M2),
];

const ENGINES: [Faults; 3] = [Faults::Threads, Faults::Signal, Faults::Kernel];

fn size_of(align: Geometry) -> ByteSize {
    match align {
        Geometry::K4 => ByteSize::kib(256),
        Geometry::M2 => ByteSize::mib(8),
        Geometry::G1 => ByteSize::gib(2),
    }
}

/// Does `case` for every kind of device. Where one is not to be had, it was said why.
fn matrix(case: impl Fn(&Bed, &Device)) {
    some(&MATRIX, case);
}

/// The same without 1G, of which two pages take a second to come and go.
fn quick_matrix(case: impl Fn(&Bed, &Device)) {
    let quick = MATRIX.map(|kind| if kind.1 == Geometry::G1 { MATRIX[0] } else { kind });
    some(&quick[1..], case);
}

fn some(kinds: &[(Under, Geometry)], case: impl Fn(&Bed, &Device)) {
    for &(under, align) in kinds {
        let Some(bed) = Bed::new(under, size_of(align), align, Mode::DevDax) else { continue };
        for faults in ENGINES {
            if under == Under::File && faults != Faults::Kernel {
                continue;
            }
            println!("{under:?}, {align}, {faults:?}");
            let Some(device) = bed.device(faults) else { continue };
            assert_eq!((device.align(), device.size(), device.faults()), (align, size_of(align), faults));
            case(&bed, &device);
        }
    }
}

fn read(mapping: &DaxMapping, at: usize) -> u8 {
    assert!(at < mapping.len());
    // SAFETY: inside the mapping.
    unsafe { mapping.as_ptr().add(at).read_volatile() }
}

fn write(mapping: &DaxMapping, at: usize, value: u8) {
    assert!(at < mapping.len());
    // SAFETY: inside the mapping, which the tests that call this have for writing.
    unsafe { mapping.as_ptr().add(at).write_volatile(value) }
}

#[test]
fn verify_data() {
    matrix(|_, device| {
        let (align, size) = (device.align().bytes() as u64, device.size().bytes());
        for at in (0..size).step_by(align as usize / 2) {
            device.write_at(at, &(at / 2048).to_ne_bytes()).unwrap();
        }
        let options = MapOptions { protection: Protection::Read, ..MapOptions::default() };
        let mapping = device.map_with(0, size, options).unwrap();
        assert!(mapping.range().start().is_aligned_to(align as usize));
        for at in (0..size as usize).step_by(align as usize / 2) {
            // SAFETY: inside the mapping, and aligned.
            let found = unsafe { mapping.as_ptr().add(at).cast::<u64>().read_volatile() };
            assert_eq!(found, at as u64 / 2048);
        }
        let tail = device.map(size - align, align).unwrap();
        write(&tail, 5, 99);
        assert_eq!(read(&mapping, (size - align) as usize + 5), 99, "both see one page");
        tail.flush(5, 1).unwrap();
        let mut byte = [0];
        device.read_at(size - align + 5, &mut byte).unwrap();
        assert_eq!(byte, [99]);
    });
}

#[test]
fn a_fault_maps_exactly_one_compound_page() {
    matrix(|_, device| {
        if device.faults() == Faults::Kernel {
            return;
        }
        let (align, size) = (device.align().bytes(), device.size().bytes() as usize);
        let mapping = device.map(0, size as u64).unwrap();
        for (n, at) in (0..size).step_by(align).enumerate() {
            for inside in [align - 1, 0, align / 2] {
                read(&mapping, at + inside);
            }
            assert_eq!(mapping.faults(), n as u64 + 1, "one event for {}", device.align());
            let pfn = device.pfn(at as u64).unwrap();
            let identity = device.pagemap().page_data(pfn).unwrap().load(Ordering::SeqCst);
            assert_eq!(identity, 1 << 63 | (at / 4096) as u64, "the head knows what it is");
        }
        let again = device.map(0, size as u64).unwrap();
        read(&again, align);
        let pfn = device.pfn(align as u64).unwrap();
        let identity = device.pagemap().page_data(pfn).unwrap().load(Ordering::SeqCst);
        assert_eq!(identity, 1 << 63 | (align / 4096) as u64, "set once");
        mapping.forget().unwrap();
        read(&mapping, 0);
        assert_eq!(mapping.faults(), (size / align) as u64 + 1);
        // A thread of the device lets its reference go after it has answered.
        let deadline = Instant::now() + Duration::from_secs(10);
        while !device.pagemap().live().is_zero() {
            assert!(Instant::now() < deadline, "a page that is merely mapped is not in use");
        }
    });
}

#[test]
fn unaligned_private_and_outside_are_refused() {
    quick_matrix(|_, device| {
        let (align, size) = (device.align().bytes() as u64, device.size().bytes());
        for (offset, len, what) in [(align / 2, align, "offset"), (0, align + 1, "length"), (0, 0, "length")]
        {
            let refused = device.map(offset, len).unwrap_err();
            let told = refused.to_string();
            assert!(matches!(refused, MapError::Misaligned { .. }), "{told}");
            assert!(told.contains(what) && told.contains(&format!("{:#x}", align)), "{told}");
        }
        assert!(matches!(device.map(size, align), Err(MapError::Outside { .. })));
        assert!(matches!(device.map(align, size), Err(MapError::Outside { .. })));
        assert!(matches!(device.map(u64::MAX - align + 1, align), Err(MapError::Outside { .. })));
        let private = MapOptions { private: true, ..MapOptions::default() };
        assert!(matches!(device.map_with(0, align, private), Err(MapError::Private { .. })));
        let mut byte = [0];
        assert!(matches!(device.read_at(size, &mut byte), Err(AccessError::Outside { .. })));
        assert!(matches!(device.pin(size, 1), Err(PinError::Access(AccessError::Outside { .. }))));
    });
}

#[test]
fn sync_is_promised_where_it_can_be_kept() {
    quick_matrix(|bed, device| {
        let options = MapOptions { sync: true, ..MapOptions::default() };
        let mapped = device.map_with(0, device.align().bytes() as u64, options);
        if bed.store.medium().path().is_some() {
            assert!(matches!(mapped, Err(MapError::NoSync { .. })), "the page cache keeps no such promise");
        } else {
            mapped.unwrap().flush(0, 4096).unwrap();
        }
    });
}

#[test]
fn addresses_are_congruent_to_offsets() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(8), Geometry::K4, Mode::DevDax).unwrap();
    let Some(device) = bed.device(Faults::Threads) else { return };
    for page in [0, 1, 511, 512, 700] {
        let mapping = device.map(page * 4096, 8 * 4096).unwrap();
        assert_eq!(mapping.range().first().get() as u64 % 512, page % 512);
    }
}

#[test]
fn several_ranges_are_one_device() {
    let store = std::sync::Arc::new(Store::memory(ByteSize::mib(16), None, 0).unwrap());
    let spec = |mib| Spec { size: Some(ByteSize::mib(mib)), ..Spec::default() };
    let ids: Vec<_> = (0..4).map(|_| store.create_namespace(&spec(4)).unwrap()).collect();
    store.destroy(ids[0]).unwrap();
    store.destroy(ids[2]).unwrap();
    let id = store.create_namespace(&spec(8)).unwrap();
    assert_eq!(store.table().unwrap().get(id).unwrap().extents.len(), 2);
    let device = match Device::open(&store, id, Faults::Threads) {
        Err(why) => return println!("skipped: {why}"),
        Ok(device) => device,
    };
    let bytes: Vec<u8> = (0..8 << 20).map(|n: u32| (n >> 12) as u8).collect();
    device.write_at(0, &bytes).unwrap();
    let mapping = device.map(2 << 20, 4 << 20).unwrap();
    for at in (0..4 << 20).step_by(4096) {
        assert_eq!(read(&mapping, at), (((2 << 20) + at) >> 12) as u8);
    }
    assert_eq!(mapping.faults(), 2);
    let mut back = vec![0; 8 << 20];
    device.read_at(0, &mut back).unwrap();
    assert_eq!(back, bytes);
    let lost = device.inject_error((4 << 20) - 4096, 8192).unwrap();
    assert_eq!(
        (lost.pages.size(), lost.mappings),
        (ByteSize::mib(4), 1),
        "one page on each side of the seam"
    );
}

/// `test_dax_directio`: a device's memory as source and target of direct transfers.
#[test]
fn direct_io_to_and_from_a_mapping() {
    let scratch = Scratch::new("direct");
    quick_matrix(|_, device| {
        // The kernel finds nobody there who could answer.
        if device.faults() == Faults::Signal {
            return;
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::DIRECT;
        let file = match rustix::fs::open(scratch.file("file"), flags, FileMode::from_raw_mode(0o600)) {
            Err(why) => return println!("skipped: no direct access: {why}"),
            Ok(file) => file,
        };
        let align = device.align().bytes();
        let mapping = device.map(0, 2 * align as u64).unwrap();
        write(&mapping, 0, 1);
        let pinned = device.pin(0, 2 * align as u64).unwrap();
        let count = || device.pagemap().count(device.pfn(0).unwrap());
        assert!((1..=2).contains(&count()), "ours, and for a moment that of who answered");
        device.write_at(0, &[7; 4096]).unwrap();
        // SAFETY: inside the mapping; nobody else uses the bytes meanwhile.
        unsafe {
            let from = std::slice::from_raw_parts(mapping.as_ptr().as_ptr(), 4096);
            assert_eq!(rustix::io::pwrite(&file, from, 0).unwrap(), 4096);
            let to = std::slice::from_raw_parts_mut(mapping.as_ptr().as_ptr().add(align), 4096);
            assert_eq!(rustix::io::pread(&file, to, 0).unwrap(), 4096);
        }
        assert_eq!(read(&mapping, align + 4095), 7);
        drop(pinned);
        let deadline = Instant::now() + Duration::from_secs(10);
        while count() > 0 {
            assert!(Instant::now() < deadline);
        }
    });
}

#[test]
fn poison_takes_the_compound_page_and_writing_whole_pages_mends_it() {
    matrix(|bed, device| {
        let align = device.align().bytes();
        let bytes = vec![3; align];
        device.write_at(0, &bytes[..align.min(1 << 20)]).unwrap();
        let (one, two) = (device.map(0, 2 * align as u64).unwrap(), device.map(0, align as u64).unwrap());
        for mapping in [&one, &two] {
            read(mapping, 0);
        }
        read(&one, align);
        let at = align as u64 / 2 / 4096 * 4096;
        let lost = device.inject_error(at, 4096).unwrap();
        assert_eq!((lost.pages.bytes(), lost.mappings), (align, 2), "the whole page, in both mappings");
        for mapping in [&one, &two] {
            for inside in [0, align / 2, align - 1] {
                // SAFETY: inside the mapping; only the address is used.
                assert!(!readable(unsafe { mapping.as_ptr().as_ptr().add(inside) }));
            }
        }
        assert_eq!(read(&one, align), read(&one, align), "its neighbour is fine");
        let later = device.map(0, align as u64).unwrap();
        assert!(!readable(later.as_ptr().as_ptr()), "a mapping made afterwards has it neither");
        assert!(matches!(device.pin(0, 1), Err(PinError::Page(_))));
        let mut buffer = [0; 16];
        let told = device.read_at(at, &mut buffer).unwrap_err();
        assert!(matches!(told, AccessError::Poisoned { offset } if offset == at), "{told}");
        device.read_at(at + 4096, &mut buffer[..0]).unwrap();
        assert!(matches!(device.write_at(at + 8, &[1; 4088]), Err(AccessError::Poisoned { .. })));
        let table = bed.store.table().unwrap();
        assert_eq!(table.bad_of(table.get(bed.id).unwrap()).runs().len(), 1, "the labels know");
        device.write_at(at, &[4; 4096]).unwrap();
        assert!(bed.store.table().unwrap().bad().runs().is_empty());
        for mapping in [&one, &two, &later] {
            assert_eq!(read(mapping, at as usize), 4);
        }
        if at > 0 {
            assert_eq!(read(&one, 0), 3, "what was not bad is as it was");
        }
    });
}

#[test]
fn another_handle_on_the_store_says_what_is_bad() {
    for under in [Under::File, Under::Memory] {
        let bed = Bed::new(under, ByteSize::mib(8), Geometry::M2, Mode::DevDax).unwrap();
        let Some(device) = bed.device(Faults::Threads) else { return };
        let mapping = device.map(0, 8 << 20).unwrap();
        read(&mapping, 2 << 20);
        let mark = |bad| match bed.store.medium().path() {
            Some(path) => Store::open(path).unwrap().mark(bed.id, 3 << 20, 4096, bad).unwrap(),
            None => bed.store.mark(bed.id, 3 << 20, 4096, bad).unwrap(),
        };
        let becomes = |there: bool| {
            let deadline = Instant::now() + Duration::from_secs(10);
            // SAFETY: inside the mapping; only the address is used.
            while readable(unsafe { mapping.as_ptr().as_ptr().add(2 << 20) }) != there {
                assert!(Instant::now() < deadline, "{under:?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        mark(true);
        becomes(false);
        mark(false);
        becomes(true);
    }
}

#[test]
fn kill_waits_for_pins_and_gives_up_with_everything_as_before() {
    quick_matrix(|bed, device| {
        let align = device.align().bytes();
        let mapping = device.map(0, align as u64).unwrap();
        write(&mapping, 1, 8);
        let pinned = device.pin(align as u64, 1).unwrap();
        let KillError(busy) = device.kill(Duration::from_millis(20)).unwrap_err();
        let told = busy.to_string();
        assert!(told.contains(device.name()), "{told}");
        assert_eq!(read(&mapping, 1), 8, "as before");
        drop(device.pin(0, 1).unwrap());
        drop(pinned);
        device.kill(Duration::from_secs(5)).unwrap();
        assert!(!readable(mapping.as_ptr().as_ptr()));
        assert!(matches!(device.map(0, align as u64), Err(MapError::Dead { .. })));
        assert!(matches!(device.read_at(0, &mut [0]), Err(AccessError::Dead)));
        assert!(device.pin(0, 1).is_err());
        device.kill(Duration::ZERO).unwrap();
        let refused = bed.store.destroy(bed.id).unwrap_err();
        assert!(refused.to_string().contains("is in use by process"), "{refused}");
    });
}

#[test]
fn shrinking_below_what_is_mapped_says_how_far_it_is() {
    let bed = Bed::new(Under::File, ByteSize::mib(8), Geometry::M2, Mode::DevDax).unwrap();
    let device = bed.device(Faults::Kernel).unwrap();
    let mapping = device.map(0, 4 << 20).unwrap();
    let told = bed.store.resize(bed.id, ByteSize::mib(2)).unwrap_err().to_string();
    let own = format!("process {}", std::process::id());
    assert!(told.starts_with("dax0.0 cannot shrink to 2 MiB: 4 MiB of it are mapped, by process"), "{told}");
    assert!(told.contains(&own), "{told}");
    drop(mapping);
    let told = bed.store.resize(bed.id, ByteSize::mib(2)).unwrap_err().to_string();
    assert!(told.starts_with("dax0.0 is in use by process"), "{told}");
    drop(device);
    bed.store.resize(bed.id, ByteSize::mib(2)).unwrap();
}

#[test]
fn a_namespace_of_another_mode_is_no_device() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(8), Geometry::M2, Mode::FsDax).unwrap();
    let told = Device::open(&bed.store, bed.id, Faults::Kernel).unwrap_err().to_string();
    assert!(told.contains("mode fsdax") && told.contains("uhmm dax reconfigure"), "{told}");
}

#[test]
fn without_huge_pages_the_error_says_what_reserves_them() {
    // It takes all there are before it fails.
    let _alone = alone();
    let told = Store::memory(ByteSize::gib(1 << 12), Some(Huge::G1), 0).unwrap_err().to_string();
    assert!(told.starts_with("4096 huge pages of 1G are needed and "), "{told}");
    let command = told.split("to reserve them: echo 4").nth(1).unwrap_or_default();
    assert!(command.ends_with(" > /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"), "{told}");
}

#[test]
fn pages_break_and_are_mended_under_threads_that_touch_them() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(8), Geometry::M2, Mode::DevDax).unwrap();
    for faults in ENGINES {
        let Some(device) = bed.device(faults) else { return };
        let mapping = device.map(0, 8 << 20).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Two threads on pages that never break: the windows beside them are replaced all the time.
            for unit in [0_usize, 3] {
                let (mapping, stop) = (&mapping, &stop);
                scope.spawn(move || {
                    let mut n = 0_usize;
                    while !stop.load(Ordering::Relaxed) {
                        let at = unit * (2 << 20) + n * 4096 % (2 << 20);
                        write(mapping, at, unit as u8 + 1);
                        assert_eq!(read(mapping, at), unit as u8 + 1);
                        n += 1;
                    }
                });
            }
            // One that looks at a page that does, and never finds other bytes.
            let (mapping, stop_reader) = (&mapping, &stop);
            scope.spawn(move || {
                while !stop_reader.load(Ordering::Relaxed) {
                    // SAFETY: inside the mapping; only the address is used.
                    let _ = readable(unsafe { mapping.as_ptr().as_ptr().add(2 << 20) });
                    let _ = mapping.forget();
                }
            });
            for _ in 0..200 {
                device.inject_error(2 << 20, 4096).unwrap();
                device.write_at(2 << 20, &[9; 4096]).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(read(&mapping, 2 << 20), 9);
    }
}

const CASE: &str = "UHMM_DAX_SIGBUS_CASE";

extern "C" fn on_sigbus(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel, or the chain in its place, passes the signal's information.
    let (code, order) = unsafe { ((*info).si_code, info.cast::<u8>().add(24).cast::<i16>().read()) };
    let _ = std::io::stdout().write_all(format!("\nSIGBUS code {code} lsb {order}\n").as_bytes());
    // SAFETY: ends the process.
    unsafe { libc::_exit(42) }
}

/// The body of a process that gets SIGBUS.
#[test]
fn sigbus_child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (what, faults) = case.split_once(' ').unwrap();
    let faults = ENGINES.into_iter().find(|engine| format!("{engine:?}") == faults).unwrap();
    if what != "default" {
        // SAFETY: the handler writes and ends the process.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()), 0);
        }
    }
    let bed = Bed::new(Under::Memory, ByteSize::mib(8), Geometry::M2, Mode::DevDax).unwrap();
    let Some(device) = bed.device(faults) else { return };
    let mapping = device.map(0, 8 << 20).unwrap();
    read(&mapping, 0);
    if what == "killed" {
        device.kill(Duration::from_secs(5)).unwrap();
    } else {
        device.inject_error(4096, 4096).unwrap();
    }
    read(&mapping, 0);
    println!("no SIGBUS");
}

#[test]
fn sigbus_says_how_much_is_lost() {
    for faults in ENGINES {
        for (what, code, told) in [
            ("poisoned", Some(42), "SIGBUS code 4 lsb 21"),
            ("killed", Some(42), "SIGBUS code 2 lsb"),
            ("default", None, "running 1 test"),
        ] {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["sigbus_child", "--exact", "--nocapture", "--test-threads=1"])
                .env(CASE, format!("{what} {faults:?}"))
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            if text.contains("skipped:") {
                return println!("{text}");
            }
            assert_eq!(output.status.code(), code, "{what} {faults:?}: {text}");
            assert!(text.contains(told), "{what} {faults:?}: {text}");
            if code.is_none() {
                assert_eq!(output.status.signal(), Some(libc::SIGBUS));
            }
        }
    }
}

#[test]
fn a_mapping_outlives_its_device_and_its_store() {
    let bed = Bed::new(Under::Memory, ByteSize::mib(8), Geometry::M2, Mode::DevDax).unwrap();
    for faults in ENGINES {
        let Some(device) = bed.device(faults) else { return };
        let mapping = device.map(0, 8 << 20).unwrap();
        drop(device);
        write(&mapping, 5 << 20, 1);
        assert_eq!(read(&mapping, 5 << 20), 1);
        assert!(bed.store.destroy(bed.id).is_err(), "it keeps the namespace");
    }
    bed.store.destroy(bed.id).unwrap();
}
