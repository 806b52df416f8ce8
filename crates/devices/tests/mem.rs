//! What only memory does: sharing, and giving memory back.

use uhmm_addr::{ByteSize, PageCount};
use uhmm_core::device::{Device, DevicePage, MemoryType, PeerTransfer};
use uhmm_devices::{Backing, DeviceUrl, MemDevice, OpenError, OpenOptions, Opened, open};
use uhmm_testdev::device_suite::{Ram, read, write};

const SIZE: ByteSize = ByteSize::mib(8);

fn stamped(pages: usize, stamp: u64) -> Ram {
    let mut ram = Ram::new(pages);
    (0..pages).for_each(|i| ram.stamp(i, stamp));
    ram
}

#[test]
fn shared_memory_is_the_same_behind_its_handle() {
    let url = DeviceUrl::Memory { size: SIZE };
    let first = Opened::open(&url, OpenOptions { shared: true, ..OpenOptions::default() }).unwrap();
    let handle = first.handle().unwrap();
    assert_eq!((handle.backing, handle.size), (Backing::Memory, SIZE));
    let second = uhmm_devices::from_handle(handle).unwrap();
    write(&*first.device(), &stamped(8, 5), &[(0, 8, 3)]);
    let target = Ram::new(8);
    read(&*second, &target, &[(0, 8, 3)]);
    assert_eq!(target.stamp_of(7), Some(5));
}

#[test]
fn shared_memory_cannot_be_cut_off() {
    let device = MemDevice::shared(SIZE).unwrap();
    assert!(rustix::fs::ftruncate(device.fd().unwrap(), 4096).is_err());
    let mut handle = device.handle().unwrap();
    handle.size = ByteSize::mib(16);
    assert!(matches!(uhmm_devices::from_handle(handle).err(), Some(OpenError::TooSmall { .. })));
}

#[test]
fn private_memory_has_no_handle() {
    let device = MemDevice::private(SIZE).unwrap();
    assert!(device.fd().is_none());
    assert_eq!(device.handle().unwrap_err(), OpenError::NotShared);
    assert_eq!((device.name(), device.memory_type()), ("mem:8MiB", MemoryType::Private));
}

#[test]
fn anonymous_memory_of_a_device_can_be_told_by_its_name() {
    let _device = MemDevice::private(SIZE).unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let page = Ram::new(1);
    let start = page.transfer(0, 1, DevicePage(0)).ram();
    // SAFETY: one page that `page` owns; the slice only says where it is.
    let region = unsafe { std::slice::from_raw_parts(start.as_ptr(), 4096) };
    if let Err(reason) = rustix::process::set_virtual_memory_region_name(region, Some(c"uhmm-test")) {
        println!("skipped: this kernel has no names for anonymous memory: {reason}");
        return;
    }
    assert!(maps.contains("[anon:uhmm:device]"), "{maps}");
}

#[test]
fn discarded_shared_memory_goes_back_to_the_machine() {
    let device = MemDevice::shared(SIZE).unwrap();
    write(&device, &stamped(1024, 5), &[(0, 1024, 0)]);
    let blocks = || rustix::fs::fstat(device.fd().unwrap()).unwrap().st_blocks;
    let before = blocks();
    device.discard(DevicePage(0), PageCount::new(512)).unwrap();
    assert_eq!(before - blocks(), 512 * 8);
}

#[test]
fn memory_is_copied_to_other_memory_directly() {
    let devices = [MemDevice::private(SIZE).unwrap(), MemDevice::shared(SIZE).unwrap()];
    let [from, to] = &devices;
    write(from, &stamped(8, 5), &[(0, 8, 3)]);
    let end = from.capacity().get() as u64;
    let pages = PageCount::new(8);
    let mut batch = [
        PeerTransfer::new(DevicePage(3), DevicePage(40), pages),
        PeerTransfer::new(DevicePage(3), DevicePage(end - 7), pages),
        PeerTransfer::new(DevicePage(end - 7), DevicePage(3), pages),
    ];
    assert!(to.copy_from(from, &mut batch));
    assert_eq!(batch.map(|piece| piece.outcome().is_ok()), [true, false, false]);
    let target = Ram::new(8);
    read(to, &target, &[(0, 8, 40)]);
    assert_eq!((0..8).map(|page| target.stamp_of(page)).collect::<Vec<_>>(), vec![Some(5); 8]);
    // Not onto itself, and not from what is no memory.
    assert!(!to.copy_from(to, &mut batch));
    let file = uhmm_devices::FileDevice::temporary(None, Some(SIZE)).unwrap();
    assert!(!to.copy_from(&file, &mut batch) && !file.copy_from(to, &mut batch));
}

#[test]
fn what_cannot_be_had_is_refused() {
    for size in [0, 5000, 1 << 63] {
        let size = ByteSize::new(size);
        assert!(matches!(MemDevice::private(size).unwrap_err(), OpenError::Size { .. }));
    }
    let size = ByteSize::new(1 << 55);
    assert!(matches!(MemDevice::private(size).unwrap_err(), OpenError::Memory { .. }));
    assert!(matches!(MemDevice::shared(size).unwrap_err(), OpenError::Memory { .. }));
    assert!(open(&"mem:4K".parse().unwrap(), OpenOptions::default()).is_ok());
}
