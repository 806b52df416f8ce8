//! The ioctls of `/sys/kernel/debug/gup_test`.
//!
//! What    [`serve`], of the calls that get hold of pages and let go of them. To a process by itself getting and pinning
//!         are the same.
//! ABI     the kernel's `mm/gup_test.h`: `struct gup_test`, 80 bytes, answered in place.
//! Fails   with an error number. A range that ends early is no error: the answer says how far it went.

use uhmm::{PAGE_SIZE, PageCount, PinFor, VirtAddr};
use uhmm_dmirror::{Dmirror, load, store};

use crate::command::{Errno, range};

/// `_IOWR('g', n, struct gup_test)`: fast get, fast pin, long pin, get, pin.
const COMMANDS: std::ops::RangeInclusive<u32> = 0xc050_6701..=0xc050_6705;

/// The one that always holds pages for long.
const PIN_LONG: u32 = 0xc050_6703;

/// `struct gup_test`, its first five words; flags for the kernel's function follow.
const BYTES: usize = 80;
const GET_USEC: usize = 0;
const PUT_USEC: usize = 8;
const ADDR: usize = 16;
const SIZE: usize = 24;
const PAGES_PER_CALL: usize = 32;
const GUP_FLAGS: usize = 36;

/// `FOLL_WRITE`.
const WRITE: u32 = 1;
/// `FOLL_LONGTERM`.
const LONGTERM: u32 = 0x100;

/// Serves one request, whose structure is at `at`.
pub fn serve(machine: &Dmirror, request: u32, at: VirtAddr) -> Result<(), Errno> {
    if !COMMANDS.contains(&request) {
        return Err(Errno(libc::EINVAL));
    }
    let mut bytes = [0; BYTES];
    load(at, &mut bytes)?;
    let long = |at: usize| u64::from_ne_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 8]));
    let short = |at: usize| u32::from_ne_bytes(*bytes[at..].first_chunk().unwrap_or(&[0; 4]));
    let range = range(long(ADDR), long(SIZE).checked_next_multiple_of(PAGE_SIZE as u64))?;
    let purpose = if short(GUP_FLAGS) & WRITE == 0 { PinFor::Read } else { PinFor::Write };
    let for_long = request == PIN_LONG || short(GUP_FLAGS) & LONGTERM != 0;
    let held = machine.hold(range, PageCount::new(short(PAGES_PER_CALL) as usize), purpose, for_long);
    let mut answer = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
    answer(GET_USEC, held.get.as_micros() as u64);
    answer(PUT_USEC, held.put.as_micros() as u64);
    answer(SIZE, held.pages.bytes() as u64);
    // SAFETY: the program's structure, which it gave to be answered in.
    Ok(unsafe { store(at, &bytes) }?)
}
