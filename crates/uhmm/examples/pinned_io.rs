//! Input by io_uring into a registered buffer that lies in managed memory.
//!
//! Whoever registers a buffer hands its pages to the kernel: they must stay where they are. `Space::pin` brings them
//! home and keeps them there, while everything else of the space may move to the device.
//!
//! ```text
//! cargo run --release --example pinned_io -- FILE
//! ```

use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use uhmm::{ByteSize, MemDevice, PinFor, Space};

const BYTES: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).unwrap_or_else(|| "/proc/self/exe".into());
    let file = File::open(path)?;
    let device = Arc::new(MemDevice::private(ByteSize::mib(64))?);
    let space = Space::builder().device(device).build()?;
    let mut buffer = space.map::<u8>(BYTES)?;

    let pinned = space.pin(buffer.range(), PinFor::Write)?;
    let mut ring = IoUring::new(2)?;
    let start = buffer.as_mut_ptr();
    // SAFETY: the buffer outlives the ring, and its pages stay where they are as long as `pinned` lives.
    unsafe { ring.submitter().register_buffers(&[libc::iovec { iov_base: start.cast(), iov_len: BYTES }]) }?;

    let read = opcode::ReadFixed::new(types::Fd(file.as_raw_fd()), start, BYTES as u32, 0).build();
    // SAFETY: nobody touches the buffer until the read is done.
    unsafe { ring.submission().push(&read) }?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().ok_or("no answer")?.result();
    let bytes = usize::try_from(result).map_err(|_| std::io::Error::from_raw_os_error(-result))?;
    println!("{bytes} bytes, beginning with {:02x?}", &buffer[..bytes.min(8)]);

    for holder in space.pins() {
        println!("pinned: {:?} for {:?}, by {}", holder.range, holder.purpose, holder.place);
    }
    println!("moved while it is pinned: {}", space.migrate(buffer.range())?.moved);
    ring.submitter().unregister_buffers()?;
    drop((ring, pinned));
    println!("moved afterwards: {}", space.migrate(buffer.range())?.moved);
    Ok(())
}
