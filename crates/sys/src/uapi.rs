//! Layouts and numbers of the kernel's interface, checked when the crate is compiled.
//!
//! What     the structures of userfaultfd and `PAGEMAP_SCAN`, and the ioctl numbers made from them.
//! Why      a request number contains the size of its structure: if either were wrong, the kernel would
//!          read or write other bytes than we own. So every size is asserted here, and every number that
//!          the bindings know as well is compared with theirs.
//! Owns     nothing; constants only.
//! Fails    at compile time.

use rustix::ioctl::{Opcode, opcode};

pub(crate) use linux_raw_sys::general::{
    page_region, pm_scan_arg, procmap_query, uffd_msg, uffdio_api, uffdio_continue, uffdio_copy, uffdio_move,
    uffdio_poison, uffdio_range, uffdio_register, uffdio_writeprotect, uffdio_zeropage,
};
use linux_raw_sys::{general as raw, ioctl as known};

const GROUP: u8 = raw::UFFDIO as u8;

/// The version that the handshake names.
pub(crate) const API: u64 = raw::UFFD_API as u64;

/// `UFFDIO_API`
pub(crate) const UFFDIO_API: Opcode = opcode::read_write::<uffdio_api>(GROUP, raw::_UFFDIO_API as u8);
/// `UFFDIO_REGISTER`
pub(crate) const UFFDIO_REGISTER: Opcode =
    opcode::read_write::<uffdio_register>(GROUP, raw::_UFFDIO_REGISTER as u8);
/// `UFFDIO_UNREGISTER`
pub(crate) const UFFDIO_UNREGISTER: Opcode =
    opcode::read::<uffdio_range>(GROUP, raw::_UFFDIO_UNREGISTER as u8);
/// `UFFDIO_WAKE`
pub(crate) const UFFDIO_WAKE: Opcode = opcode::read::<uffdio_range>(GROUP, raw::_UFFDIO_WAKE as u8);
/// `UFFDIO_COPY`
pub(crate) const UFFDIO_COPY: Opcode = opcode::read_write::<uffdio_copy>(GROUP, raw::_UFFDIO_COPY as u8);
/// `UFFDIO_ZEROPAGE`
pub(crate) const UFFDIO_ZEROPAGE: Opcode =
    opcode::read_write::<uffdio_zeropage>(GROUP, raw::_UFFDIO_ZEROPAGE as u8);
/// `UFFDIO_MOVE`
pub(crate) const UFFDIO_MOVE: Opcode = opcode::read_write::<uffdio_move>(GROUP, raw::_UFFDIO_MOVE as u8);
/// `UFFDIO_WRITEPROTECT`
pub(crate) const UFFDIO_WRITEPROTECT: Opcode =
    opcode::read_write::<uffdio_writeprotect>(GROUP, raw::_UFFDIO_WRITEPROTECT as u8);
/// `UFFDIO_CONTINUE`
pub(crate) const UFFDIO_CONTINUE: Opcode =
    opcode::read_write::<uffdio_continue>(GROUP, raw::_UFFDIO_CONTINUE as u8);
/// `UFFDIO_POISON`
pub(crate) const UFFDIO_POISON: Opcode =
    opcode::read_write::<uffdio_poison>(GROUP, raw::_UFFDIO_POISON as u8);
/// `USERFAULTFD_IOC_NEW`, on `/dev/userfaultfd`. Its argument is the flags themselves, not a pointer.
pub(crate) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(raw::USERFAULTFD_IOC as u8, 0);
/// `PAGEMAP_SCAN`, on `/proc/PID/pagemap`.
pub(crate) const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);
/// `PROCMAP_QUERY`, on `/proc/PID/maps`.
pub(crate) const PROCMAP_QUERY: Opcode = opcode::read_write::<procmap_query>(b'f', 17);
/// The mapping may be read.
pub(crate) const MAPPING_READABLE: u64 = raw::procmap_query_flags::PROCMAP_QUERY_VMA_READABLE as u64;
/// The mapping may be written.
pub(crate) const MAPPING_WRITABLE: u64 = raw::procmap_query_flags::PROCMAP_QUERY_VMA_WRITABLE as u64;
/// The mapping may be executed.
pub(crate) const MAPPING_EXECUTABLE: u64 = raw::procmap_query_flags::PROCMAP_QUERY_VMA_EXECUTABLE as u64;
/// What is written there is everybody's.
pub(crate) const MAPPING_SHARED: u64 = raw::procmap_query_flags::PROCMAP_QUERY_VMA_SHARED as u64;
/// The mapping that covers the address, or else the next one.
pub(crate) const COVERING_OR_NEXT: u64 = raw::procmap_query_flags::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64;

/// Do not wake who waits. One value for copy, zeropage, continue, poison and move.
pub(crate) const MODE_DONTWAKE: u64 = 1;
/// Install write-protected (copy, continue).
pub(crate) const MODE_COPY_WP: u64 = raw::UFFDIO_COPY_MODE_WP as u64;
/// Set the protection; without it the call lifts it.
pub(crate) const MODE_WRITEPROTECT_WP: u64 = 1;
/// Lift the protection without waking. Refused by the kernel together with [`MODE_WRITEPROTECT_WP`].
pub(crate) const MODE_WRITEPROTECT_DONTWAKE: u64 = 2;

/// Bytes in one message read from a userfaultfd.
pub(crate) const MSG_BYTES: usize = size_of::<uffd_msg>();
/// Where the argument of a message starts.
pub(crate) const MSG_ARG: usize = 8;

macro_rules! sizes {
    ($($ty:ty = $bytes:literal),* $(,)?) => { $(const _: () = assert!(size_of::<$ty>() == $bytes);)* };
}

sizes! {
    page_region = 24, pm_scan_arg = 96, procmap_query = 104, uffd_msg = 32, uffdio_api = 24, uffdio_range = 16,
    uffdio_register = 32, uffdio_copy = 40, uffdio_zeropage = 32, uffdio_writeprotect = 24,
    uffdio_continue = 32, uffdio_poison = 32, uffdio_move = 40,
}

const _: () = {
    assert!(UFFDIO_API == known::UFFDIO_API);
    assert!(UFFDIO_REGISTER == known::UFFDIO_REGISTER);
    assert!(UFFDIO_UNREGISTER == known::UFFDIO_UNREGISTER);
    assert!(UFFDIO_WAKE == known::UFFDIO_WAKE);
    assert!(UFFDIO_COPY == known::UFFDIO_COPY);
    assert!(UFFDIO_ZEROPAGE == known::UFFDIO_ZEROPAGE);
    assert!(UFFDIO_WRITEPROTECT == known::UFFDIO_WRITEPROTECT);
    assert!(UFFDIO_CONTINUE == known::UFFDIO_CONTINUE);
    // Unknown to the bindings: the numbers as every architecture with the generic ioctl layout has them.
    assert!(UFFDIO_MOVE == 0xc028_aa05);
    assert!(UFFDIO_POISON == 0xc020_aa08);
    assert!(USERFAULTFD_IOC_NEW == 0xaa00);
    assert!(PAGEMAP_SCAN == 0xc060_6610);
    assert!(PROCMAP_QUERY == 0xc068_6611);
};

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(uffd_msg, event) == 0 && offset_of!(uffd_msg, arg) == MSG_ARG);
    assert!(offset_of!(raw::uffd_msg__bindgen_ty_1__bindgen_ty_1, flags) == 0);
    assert!(offset_of!(raw::uffd_msg__bindgen_ty_1__bindgen_ty_1, address) == 8);
    assert!(offset_of!(raw::uffd_msg__bindgen_ty_1__bindgen_ty_1, feat) == 16);
    assert!(offset_of!(raw::uffd_msg__bindgen_ty_1__bindgen_ty_3, to) == 8);
    assert!(offset_of!(raw::uffd_msg__bindgen_ty_1__bindgen_ty_3, len) == 16);
    assert!(offset_of!(raw::uffd_msg__bindgen_ty_1__bindgen_ty_4, end) == 8);
    assert!(MODE_DONTWAKE == raw::UFFDIO_COPY_MODE_DONTWAKE as u64);
    assert!(MODE_DONTWAKE == raw::UFFDIO_ZEROPAGE_MODE_DONTWAKE as u64);
};
