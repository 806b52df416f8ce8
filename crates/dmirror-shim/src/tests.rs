//! What the kernel's structures and error numbers say, without a program around it.

use uhmm::{ByteSize, PAGE_SIZE, VirtAddr};
use uhmm_dmirror::{Dmirror, Handle, Node};

use crate::command::Errno;
use crate::{command, gup};

const READ: u32 = 0xc028_4800;
const WRITE: u32 = 0xc028_4801;
const MIGRATE_TO_DEV: u32 = 0xc028_4802;
const MIGRATE_TO_SYS: u32 = 0xc028_4803;
const SNAPSHOT: u32 = 0xc028_4804;
const EXCLUSIVE: u32 = 0xc028_4805;
const CHECK_EXCLUSIVE: u32 = 0xc028_4806;
const RELEASE: u32 = 0xc028_4807;
const PAGES: usize = 4;

/// What the answers are before a call.
const UNTOUCHED: u64 = 77;

/// Pages by themselves, as a program gets them from `mmap`.
struct Program {
    start: VirtAddr,
}

impl Program {
    fn new() -> Self {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping, where the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), PAGES * PAGE_SIZE, prot, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: VirtAddr::of(start) }
    }

    fn addr(&self) -> u64 {
        self.start.get() as u64
    }

    fn protect(&self, protection: i32) {
        let start = std::ptr::with_exposed_provenance_mut(self.start.get());
        // SAFETY: the test's own mapping, to which nothing refers.
        assert_eq!(unsafe { libc::mprotect(start, PAGES * PAGE_SIZE, protection) }, 0);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let start = std::ptr::with_exposed_provenance_mut(self.start.get());
        // SAFETY: the test's own mapping, to which nothing refers.
        unsafe { libc::munmap(start, PAGES * PAGE_SIZE) };
    }
}

/// `struct hmm_dmirror_cmd`.
fn command(addr: u64, ptr: u64, npages: u64) -> [u64; 5] {
    [addr, ptr, npages, UNTOUCHED, UNTOUCHED]
}

/// The error number, or the counts.
fn serve(handle: &Handle<'_>, request: u32, command: &mut [u64; 5]) -> Result<(u64, u64), i32> {
    let before = *command;
    let done = command::serve(handle, request, VirtAddr::of(&raw mut *command));
    assert_eq!(command[..3], before[..3]);
    match done {
        Ok(()) => Ok((command[3], command[4])),
        Err(Errno(number)) => {
            assert_eq!(*command, before, "an error answers nothing");
            Err(number)
        }
    }
}

fn with_device(test: impl FnOnce(&Dmirror, &Handle<'_>)) {
    // SAFETY: the tests ask about memory of their own, to which no reference is held meanwhile.
    match unsafe { Dmirror::new(ByteSize::mib(1)) } {
        Ok(machine) => test(&machine, &machine.open(Node::ALL[0]).unwrap()),
        Err(error) => {
            let required = std::env::var_os("UHMM_REQUIRE_UFFD").is_some_and(|value| value == "1");
            assert!(!required, "this must run here, but {error}");
            eprintln!("skipped: {error}");
        }
    }
}

#[test]
fn what_cannot_be_asked() {
    with_device(|_, handle| {
        let program = Program::new();
        let mut buffer = vec![0_u8; PAGES * PAGE_SIZE];
        let (addr, ptr) = (program.addr(), buffer.as_mut_ptr().expose_provenance() as u64);
        for (addr, npages) in
            [(addr + 1, 1), (addr, 0), (addr, u64::MAX), (addr, u64::MAX >> 12), (u64::MAX - 4095, 1)]
        {
            for request in [READ, WRITE, MIGRATE_TO_DEV, MIGRATE_TO_SYS, SNAPSHOT, RELEASE] {
                let done = serve(handle, request, &mut command(addr, ptr, npages));
                assert_eq!(done, Err(libc::EINVAL), "{addr:x} {npages} {request:x}");
            }
        }
        assert_eq!(serve(handle, READ + 8, &mut command(addr, ptr, 1)), Err(libc::EINVAL));
        let nowhere = command::serve(handle, READ, VirtAddr::new(16)).map_err(|Errno(number)| number);
        assert_eq!(nowhere, Err(libc::EFAULT));
    });
}

#[test]
fn answers_and_counts() {
    with_device(|_, handle| {
        let program = Program::new();
        let from: Vec<u8> = (0..PAGES * PAGE_SIZE).map(|n| (n / 7) as u8).collect();
        let mut into = vec![0_u8; PAGES * PAGE_SIZE];
        let (from_at, into_at) =
            (from.as_ptr().expose_provenance() as u64, into.as_mut_ptr().expose_provenance() as u64);
        let pages = PAGES as u64;
        let ask = |request, ptr| serve(handle, request, &mut command(program.addr(), ptr, pages));
        assert_eq!(ask(WRITE, from_at), Ok((pages, 1)));
        assert_eq!(ask(READ, into_at), Ok((pages, 0)));
        let seen = || {
            let mut seen = vec![0; into.len()];
            uhmm_dmirror::load(VirtAddr::of(into.as_ptr()), &mut seen).unwrap();
            seen
        };
        assert_eq!(seen(), from);
        assert_eq!(ask(MIGRATE_TO_DEV, into_at), Ok((pages, 0)));
        assert_eq!(ask(SNAPSHOT, into_at), Ok((pages, 0)));
        assert_eq!(seen()[..PAGES], [0x22; PAGES]);
        assert_eq!(ask(MIGRATE_TO_SYS, into_at), Ok((pages, 0)));
        assert_eq!(ask(RELEASE, into_at), Ok((0, 0)));
        assert_eq!(ask(READ, into_at), Ok((pages, 1)));
        assert_eq!(seen(), from);
        assert_eq!(ask(EXCLUSIVE, into_at), Ok((pages, 0)));
        assert_eq!(seen(), from);
        assert_eq!(ask(CHECK_EXCLUSIVE, into_at), Err(libc::EPERM));
        uhmm_dmirror::load(VirtAddr::new(program.addr() as usize), &mut vec![0; into.len()]).unwrap();
        assert_eq!(ask(CHECK_EXCLUSIVE, into_at), Ok((0, 0)));
        // Nowhere to put what was read, or nothing to write.
        assert_eq!(ask(READ, 16), Err(libc::EFAULT));
        assert_eq!(ask(WRITE, 16), Err(libc::EFAULT));
        program.protect(libc::PROT_READ);
        assert_eq!(ask(EXCLUSIVE, into_at), Err(libc::EBUSY));
        assert_eq!(ask(WRITE, from_at), Err(libc::EPERM));
        program.protect(libc::PROT_NONE);
        assert_eq!(ask(READ, into_at), Err(libc::EFAULT));
        assert_eq!(ask(MIGRATE_TO_DEV, into_at), Err(libc::EINVAL));
        assert_eq!(ask(SNAPSHOT, into_at), Ok((pages, 0)));
        assert_eq!(seen()[..PAGES], [0xff; PAGES]);
    });
}

#[test]
fn pages_are_got_hold_of() {
    with_device(|machine, handle| {
        let program = Program::new();
        let mut into = vec![0_u8; PAGES * PAGE_SIZE];
        let ptr = into.as_mut_ptr().expose_provenance() as u64;
        let request = |request, addr: u64, size: u64| {
            let mut words = [0_u64; 10];
            (words[2], words[3]) = (addr, size);
            // One page a call, and FOLL_WRITE.
            words[4] =
                u64::from_ne_bytes([1_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat().try_into().unwrap());
            let at = VirtAddr::of(&raw mut words);
            gup::serve(machine, request, at).map(|()| words[3]).map_err(|Errno(number)| number)
        };
        let size = (PAGES * PAGE_SIZE) as u64;
        for number in 0xc050_6701..=0xc050_6705 {
            serve(handle, MIGRATE_TO_DEV, &mut command(program.addr(), ptr, PAGES as u64)).unwrap();
            assert_eq!(machine.device_pages(handle.node()).get(), PAGES);
            assert_eq!(request(number, program.addr(), size), Ok(size));
            assert_eq!(machine.device_pages(handle.node()).get(), 0, "they are home, to be written");
        }
        assert_eq!(request(0xc050_6706, program.addr(), size), Err(libc::EINVAL));
        assert_eq!(request(0xc050_6701, program.addr() + 8, size), Err(libc::EINVAL));
        program.protect(libc::PROT_READ);
        assert_eq!(request(0xc050_6704, program.addr(), size), Ok(0), "as far as it goes, which is nowhere");
    });
}
