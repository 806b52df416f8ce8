//! The behaviour suite on every kind of device.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::LoopDevice;
use uhmm_addr::ByteSize;
use uhmm_core::device::Device;
use uhmm_devices::{FileDevice, FileOptions, MemDevice};
use uhmm_testdev::device_suite;

const SIZE: ByteSize = ByteSize::mib(64);

fn file(options: FileOptions, directory: &str) -> Option<Arc<dyn Device>> {
    if !Path::new(directory).is_dir() {
        println!("skipped: there is no {directory}");
        return None;
    }
    Some(Arc::new(options.temporary(Some(Path::new(directory)), Some(SIZE)).unwrap()))
}

device_suite!(memory_private, || Some(Arc::new(MemDevice::private(SIZE).unwrap())));
device_suite!(memory_coherent, || Some(Arc::new(MemDevice::coherent(SIZE, None).unwrap())));
device_suite!(memory_shared, || Some(Arc::new(MemDevice::shared(SIZE).unwrap())));
device_suite!(file_io_uring, || file(FileDevice::options(), "/var/tmp"));
device_suite!(file_one_ring, || file(FileDevice::options().rings(1), "/var/tmp"));
device_suite!(file_positioned, || file(FileDevice::options().io_uring(false), "/var/tmp"));
device_suite!(file_buffered, || file(FileDevice::options().direct(false), "/var/tmp"));
device_suite!(tmpfs_io_uring, || file(FileDevice::options().direct(false), "/dev/shm"));
device_suite!(tmpfs_positioned, || file(FileDevice::options().direct(false).io_uring(false), "/dev/shm"));
device_suite!(block_device, || {
    let disk = LoopDevice::new(SIZE)?;
    let device = FileDevice::open(&disk.path, None).unwrap();
    assert_eq!(device.capacity(), SIZE.pages());
    Some(Arc::new(device))
});
