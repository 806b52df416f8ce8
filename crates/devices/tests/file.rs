//! What only files do: sizes, modes, ends, full file systems, other processes.

mod common;

use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use common::{LoopDevice, Scratch, SmallFileSystem, output};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uhmm_addr::{ByteSize, PageCount};
use uhmm_core::device::{Device, DevicePage, TransferError};
use uhmm_devices::{DeviceUrl, FileDevice, FileOptions, OpenError, OpenOptions, Opened};
use uhmm_testdev::device_suite::{Ram, read, write};

const SIZE: ByteSize = ByteSize::mib(8);

/// Every way to access a file.
fn ways() -> [FileOptions; 4] {
    let options = FileDevice::options();
    [options, options.io_uring(false), options.direct(false), options.io_uring(false).direct(false)]
}

fn blocks(device: &FileDevice) -> u64 {
    rustix::fs::fstat(device.fd()).unwrap().st_blocks as u64
}

#[test]
fn a_truncated_file_is_short_and_never_zeros() {
    let directory = Scratch::new("/var/tmp");
    for (i, options) in ways().into_iter().enumerate() {
        let path = directory.file(&i.to_string());
        let device = options.open(&path, Some(SIZE)).unwrap();
        let ram = Ram::new(600);
        write(&device, &ram, &[(0, 600, 0)]);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(5 * 4096 + 100).unwrap();
        let mut alone = [ram.transfer(0, 4, DevicePage(4))];
        device.read(&mut alone);
        assert_eq!(alone[0].outcome(), Err(TransferError::Short(4096 + 100)), "{options:?}");
        let mut several = [
            ram.transfer(0, 2, DevicePage(0)),
            ram.transfer(2, 2, DevicePage(2)),
            ram.transfer(4, 2, DevicePage(4)),
            ram.transfer(6, 2, DevicePage(6)),
            ram.transfer(8, 592, DevicePage(3)),
        ];
        device.read(&mut several);
        let outcomes: Vec<_> = several.iter().map(|t| t.outcome()).collect();
        let short = |bytes| Err(TransferError::Short(bytes));
        assert_eq!(outcomes, [Ok(()), Ok(()), short(4196), short(0), short(2 * 4096 + 100)], "{options:?}");
    }
}

#[test]
fn a_full_file_system_is_full() {
    for options in ways() {
        let Some(small) = SmallFileSystem::new("size=1m") else { return };
        let device = options.temporary(Some(&small.0.0), Some(SIZE)).unwrap();
        let ram = Ram::new(512);
        let mut batch: Vec<_> = (0..512).map(|i| ram.transfer(i, 1, DevicePage(i as u64))).collect();
        device.write(&mut batch);
        let full = batch.iter().filter(|t| t.outcome() == Err(TransferError::Full)).count();
        let done = batch.iter().filter(|t| t.outcome().is_ok()).count();
        assert!((200..=256).contains(&done) && done + full == 512, "{options:?}: {done} done, {full} full");
        let mut alone = [ram.transfer(0, 1, DevicePage(1000))];
        device.write(&mut alone);
        assert_eq!(alone[0].outcome(), Err(TransferError::Full), "{options:?}");
        device.discard(DevicePage(0), PageCount::new(512)).unwrap();
        write(&device, &ram, &[(0, 1, 1000)]);
    }
}

#[test]
fn without_a_size_a_temporary_file_fits_its_file_system() {
    let Some(small) = SmallFileSystem::new("size=1m") else { return };
    let device = FileDevice::temporary(Some(&small.0.0), None).unwrap();
    assert!((200..=230).contains(&device.capacity().get()), "{}", device.capacity());
    let full = SmallFileSystem::new("size=4k").unwrap();
    std::fs::write(full.0.file("a"), [0; 4096]).unwrap();
    let refused = FileDevice::temporary(Some(&full.0.0), None).unwrap_err();
    assert_eq!(refused, OpenError::NoSpace { directory: full.0.0.clone() });
}

#[test]
fn files_are_private_and_temporary_ones_have_no_name() {
    let directory = Scratch::new("/var/tmp");
    let named = FileDevice::open(&directory.file("far.img"), Some(SIZE)).unwrap();
    let temporary = FileDevice::temporary(Some(&directory.0), Some(SIZE)).unwrap();
    for device in [&named, &temporary] {
        let stat = rustix::fs::fstat(device.fd()).unwrap();
        assert_eq!((stat.st_mode & 0o777, stat.st_size as u64), (0o600, SIZE.bytes()));
        assert_eq!(blocks(device), 0);
    }
    assert_eq!(rustix::fs::fstat(temporary.fd()).unwrap().st_nlink, 0);
    assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 1);
    assert_eq!((temporary.path(), temporary.name()), (&*directory.0, "file:?size=8MiB"));
    assert_eq!(named.name(), format!("file:{}?size=8MiB", directory.file("far.img").display()));
}

/// Has the kernel refuse nameless files to the calling thread, as file systems do that have none.
fn without_nameless_files() {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const BITS: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EOPNOTSUPP as u32;
    // The number of the call, and its second and third argument. Jumps count from the next instruction.
    let (number, second, third) = (0, 24, 32);
    let nameless = (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32;
    let mut filter = [
        (LOAD, 0, 0, number),
        (EQUAL, 1, 0, libc::SYS_open as u32),
        (EQUAL, 2, 4, libc::SYS_openat as u32),
        (LOAD, 0, 0, second),
        (BITS, 3, 2, nameless),
        (LOAD, 0, 0, third),
        (BITS, 1, 0, nameless),
        (RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        (RETURN, 0, 0, refusal),
    ]
    .map(|(code, jt, jf, k)| libc::sock_filter { code: code as u16, jt, jf, k });
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its instructions are as the kernel wants them, and live until the call returns.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn where_there_are_no_nameless_files_the_name_is_taken_away_at_once() {
    let directory = Scratch::new("/var/tmp");
    let work = || {
        without_nameless_files();
        let flags = OFlags::TMPFILE | OFlags::RDWR;
        assert_eq!(rustix::fs::open(&directory.0, flags, Mode::RUSR).unwrap_err(), Errno::OPNOTSUPP);
        for options in ways() {
            let device = options.temporary(Some(&directory.0), Some(SIZE)).unwrap();
            let stat = rustix::fs::fstat(device.fd()).unwrap();
            assert_eq!((stat.st_mode & 0o777, stat.st_size as u64, stat.st_nlink), (0o600, SIZE.bytes(), 0));
            assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 0);
            let mut ram = Ram::new(2);
            ram.stamp(0, 7);
            write(&device, &ram, &[(0, 1, 5)]);
            read(&device, &ram, &[(1, 1, 5)]);
            assert_eq!(ram.stamp_of(1), Some(7), "{options:?}");
        }
    };
    // The refusal is the thread's.
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

#[test]
fn space_is_taken_ahead_of_what_is_written_and_reads_as_zeros() {
    let directory = Scratch::new("/var/tmp");
    let device = FileDevice::temporary(Some(&directory.0), Some(SIZE)).unwrap();
    let mut ram = Ram::new(2);
    ram.stamp(0, 7);
    write(&device, &ram, &[(0, 1, 3)]);
    if device.direct() {
        assert_eq!(blocks(&device) * 512, SIZE.bytes(), "writes that follow find their blocks");
    }
    read(&device, &ram, &[(0, 1, 2), (1, 1, 3)]);
    assert_eq!((ram.stamp_of(0), ram.stamp_of(1)), (Some(0), Some(7)));
}

#[test]
fn a_discard_returns_the_space() {
    let device = FileDevice::temporary(Some(Path::new("/var/tmp")), Some(SIZE)).unwrap();
    let mut ram = Ram::new(512);
    (0..512).for_each(|i| ram.stamp(i, 7));
    write(&device, &ram, &[(0, 512, 0)]);
    let before = blocks(&device);
    device.discard(DevicePage(100), PageCount::new(256)).unwrap();
    assert!(device.returns_space());
    assert_eq!(before - blocks(&device), 256 * 8);
}

#[test]
fn an_existing_file_keeps_its_size_and_its_bytes() {
    let directory = Scratch::new("/var/tmp");
    let path = directory.file("old");
    std::fs::write(&path, vec![0; 3 * 4096 + 5]).unwrap();
    let device = FileDevice::open(&path, None).unwrap();
    assert_eq!(device.capacity(), PageCount::new(3));
    let busy = FileDevice::open(&path, None).unwrap_err();
    assert_eq!(busy, OpenError::Busy { path: path.clone() });
    drop(device);
    assert_eq!(FileDevice::open(&path, Some(ByteSize::new(4096))).unwrap().capacity(), PageCount::ONE);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 * 4096 + 5);
    assert_eq!(FileDevice::open(&path, Some(SIZE)).unwrap().capacity(), SIZE.pages());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE.bytes());
}

#[test]
fn what_cannot_be_opened_says_why() {
    let directory = Scratch::new("/var/tmp");
    let missing = directory.file("missing");
    let open = |path: &Path, size| FileDevice::open(path, size).unwrap_err();
    assert_eq!(open(&missing, None), OpenError::SizeNeeded { path: missing.clone() });
    let nowhere = directory.file("no/such");
    assert_eq!(open(&nowhere, Some(SIZE)), OpenError::DirectoryMissing { directory: directory.file("no") });
    assert!(matches!(open(&directory.0, None), OpenError::NotAFile { what: "directory", .. }));
    assert!(matches!(
        open(Path::new("/dev/null"), None),
        OpenError::NotAFile { what: "character device", .. }
    ));
    assert_eq!(open(&missing, Some(ByteSize::new(5000))), OpenError::Size { bytes: 5000 });
    let huge = ByteSize::new(1 << 62);
    assert_eq!(open(&missing, Some(huge)), OpenError::TooLarge { path: missing.clone(), size: huge });
    assert_eq!(missing.metadata().unwrap_err().kind(), ErrorKind::NotFound, "left behind");
    std::fs::write(&missing, b"x").unwrap();
    assert!(matches!(open(&missing, None), OpenError::TooSmall { has: 1, .. }));
    let gone = FileDevice::temporary(Some(&nowhere), Some(SIZE)).unwrap_err();
    assert_eq!(gone, OpenError::DirectoryMissing { directory: nowhere });
}

#[test]
fn a_mounted_block_device_is_refused() {
    let Some(disk) = LoopDevice::new(ByteSize::mib(64)) else { return };
    let at = disk.path.display().to_string();
    let first = FileDevice::open(&disk.path, None).unwrap();
    assert!(std::fs::metadata(&disk.path).unwrap().file_type().is_block_device());
    assert_eq!(FileDevice::open(&disk.path, None).unwrap_err(), OpenError::Busy { path: disk.path.clone() });
    drop(first);
    let large = FileDevice::open(&disk.path, Some(ByteSize::gib(1))).unwrap_err();
    assert!(matches!(large, OpenError::TooSmall { has: 0x400_0000, .. }));
    if let Err(reason) = output("mkfs.ext4", &["-q", &at]) {
        println!("skipped the mounted part: mkfs.ext4: {reason}");
        return;
    }
    let mount = Scratch::new("/var/tmp");
    let on = mount.0.display().to_string();
    if let Err(reason) = output("mount", &[&at, &on]) {
        println!("skipped the mounted part: mount: {reason}");
        return;
    }
    let refused = FileDevice::open(&disk.path, None).map(|device| device.capacity());
    output("umount", &[&on]).unwrap();
    assert_eq!(refused, Err(OpenError::Busy { path: disk.path.clone() }));
}

#[test]
fn a_handle_is_the_same_device() {
    let url: DeviceUrl = "file:?size=8MiB".parse().unwrap();
    let first = Opened::open(&url, OpenOptions::default()).unwrap();
    let second = Opened::from_handle(first.handle().unwrap(), FileOptions::default()).unwrap();
    let mut ram = Ram::new(64);
    (0..64).for_each(|i| ram.stamp(i, 77));
    write(&*first.device(), &ram, &[(0, 64, 5)]);
    let target = Ram::new(64);
    read(&*second.device(), &target, &[(0, 64, 5)]);
    assert_eq!(target.stamp_of(63), Some(77));
    let (Opened::File(first), Opened::File(second)) = (first, second) else { panic!("not files") };
    assert_eq!((first.capacity(), first.direct()), (second.capacity(), second.direct()));
    let mut handle = first.handle().unwrap();
    handle.size = ByteSize::mib(16);
    assert!(matches!(
        Opened::from_handle(handle, FileOptions::default()),
        Err(OpenError::TooSmall { has: 0x80_0000, .. })
    ));
}

#[test]
fn a_filter_on_io_uring_costs_speed_only() {
    let device = FileDevice::options().io_uring(false).temporary(None, Some(SIZE)).unwrap();
    assert!(!device.uses_io_uring());
    let device = FileDevice::options().rings(0).temporary(None, Some(SIZE)).unwrap();
    assert!(!device.uses_io_uring());
    write(&device, &Ram::new(64), &[(0, 32, 0), (32, 32, 100)]);
}

/// The child's copy of a device works, and leaves the parent's rings alone.
#[test]
fn a_child_made_by_fork_has_the_device_too() {
    let device = FileDevice::temporary(Some(Path::new("/var/tmp")), Some(SIZE)).unwrap();
    let mut ram = Ram::new(128);
    (0..128).for_each(|i| ram.stamp(i, 9));
    write(&device, &ram, &[(0, 64, 0), (64, 64, 64)]);
    // SAFETY: the child only makes transfers, which neither allocate nor take locks, and ends with `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let target = [ram.transfer(0, 64, DevicePage(0)), ram.transfer(64, 64, DevicePage(64))];
        let mut batch = target;
        device.read(&mut batch);
        let fine = batch.iter().all(|t| t.outcome().is_ok()) && !device.uses_io_uring();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if fine && ram.stamp_of(127) == Some(9) { 0 } else { 1 }) }
    }
    let mut status = 0;
    // SAFETY: `status` is ours, and `child` is a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    read(&device, &ram, &[(0, 64, 0), (64, 64, 64)]);
}
