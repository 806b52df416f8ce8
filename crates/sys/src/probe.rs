//! What the running kernel can do for us, and the one command that would grant what it will not.
//!
//! What     [`probe`] asks once, by trying and by reading `/proc` and `/sys`; [`Capabilities::rows`] is the
//!          answer as a table for people.
//! Why      nothing is concluded from a version number: distributions backport, containers filter.
//! Owns     nothing; every descriptor that was opened for a trial is closed again.
//! Fails    never: what cannot be found out counts as absent, with the reason in the row.

use std::ffi::CStr;
use std::fs;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use uhmm_addr::ByteSize;
use uhmm_addr::{PAGE_SIZE, VaRange, VirtAddr};

use crate::scan::{PagemapScan, Query, Region};
use crate::uffd::{self, Features};

#[cfg(test)]
mod tests;

/// How userfaultfd can be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UffdAccess {
    /// By the system call, in full.
    Syscall,
    /// By `/dev/userfaultfd`, in full.
    DeviceNode,
    /// By the system call, for faults of user code alone: system calls on absent pages fail.
    UserModeOnly,
    /// Not at all.
    None {
        /// What the system call said.
        syscall: Errno,
        /// What the device node said.
        device: Errno,
    },
}

/// Pages of one size that are set aside.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HugePool {
    /// In the pool.
    pub total: u64,
    /// Of them, unused.
    pub free: u64,
}

/// Everything that was found out.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// The kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// How userfaultfd can be had.
    pub uffd: UffdAccess,
    /// What a userfaultfd can do here; none without one.
    pub features: Features,
    /// Whether the fork event would be permitted (`CAP_SYS_PTRACE`).
    pub fork_events: bool,
    /// Whether `PAGEMAP_SCAN` works.
    pub pagemap_scan: bool,
    /// Whether io_uring can be set up; else what it said.
    pub io_uring: Result<(), Errno>,
    /// Transparent huge pages: `always`, `madvise` or `never`; empty if unknown.
    pub thp: String,
    /// The same of shared memory.
    pub shmem_thp: String,
    /// Huge pages of 2 MiB.
    pub hugetlb_2m: HugePool,
    /// Huge pages of 1 GiB.
    pub hugetlb_1g: HugePool,
    /// Swap space.
    pub swap: ByteSize,
    /// Whether anonymous mappings can have names.
    pub anon_names: bool,
    /// Processors this process may use.
    pub cpus: usize,
    /// Effective user.
    pub euid: u32,
    /// RAM.
    pub memory: ByteSize,
    /// Who may trace whom (Yama); `None` without Yama.
    pub ptrace_scope: Option<u32>,
    /// Mappings that a process may have.
    pub max_map_count: u64,
    /// `vm.overcommit_memory`: 0 guesses, 1 always, 2 never.
    pub overcommit: u32,
}

/// One line of the table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CapabilityRow {
    /// What.
    pub name: &'static str,
    /// Whether it is there.
    pub have: bool,
    /// How much of it, or why not.
    pub detail: String,
    /// What it is good for.
    pub needed_for: &'static str,
    /// The one command that would grant it, if one would.
    pub grant: Option<String>,
}

/// Asks the running kernel.
pub fn probe() -> Capabilities {
    let (uffd, features, fork_events) = probe_uffd();
    let meminfo = read("/proc/meminfo");
    Capabilities {
        kernel: read("/proc/sys/kernel/osrelease"),
        uffd,
        features,
        fork_events,
        pagemap_scan: probe_pagemap_scan(),
        io_uring: probe_io_uring(),
        thp: chosen(&read("/sys/kernel/mm/transparent_hugepage/enabled")),
        shmem_thp: chosen(&read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        hugetlb_2m: pool("hugepages-2048kB"),
        hugetlb_1g: pool("hugepages-1048576kB"),
        swap: kib_line(&meminfo, "SwapTotal:"),
        anon_names: probe_anon_names(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        euid: rustix::process::geteuid().as_raw(),
        memory: kib_line(&meminfo, "MemTotal:"),
        ptrace_scope: read("/proc/sys/kernel/yama/ptrace_scope").parse().ok(),
        max_map_count: read("/proc/sys/vm/max_map_count").parse().unwrap_or(65_530),
        overcommit: read("/proc/sys/vm/overcommit_memory").parse().unwrap_or(0),
    }
}

fn probe_uffd() -> (UffdAccess, Features, bool) {
    let (access, fd) = match uffd::open_syscall() {
        Ok(fd) => (UffdAccess::Syscall, fd),
        Err(syscall) => match uffd::open_device() {
            Ok(fd) => (UffdAccess::DeviceNode, fd),
            Err(device) => match uffd::open_user_mode() {
                Ok(fd) => (UffdAccess::UserModeOnly, fd),
                Err(_) => return (UffdAccess::None { syscall, device }, Features::NONE, false),
            },
        },
    };
    // The first handshake either fails and leaves the descriptor as it was, or is the only one needed.
    let (answer, fork) = match uffd::handshake(fd.as_fd(), Features::EVENT_FORK) {
        Ok(features) => (Ok(features), true),
        Err(_) => (uffd::handshake(fd.as_fd(), Features::NONE), false),
    };
    (access, answer.unwrap_or(Features::NONE), fork)
}

fn probe_pagemap_scan() -> bool {
    let Ok(scan) = PagemapScan::open() else {
        return false;
    };
    let local = 0_u8;
    let here = VaRange::page(VirtAddr::of(&raw const local).page());
    let mut out = [Region::UNUSED; 1];
    scan.scan(here, Query::PRESENT, &mut out).is_ok() && !scan.is_fallback()
}

fn probe_io_uring() -> Result<(), Errno> {
    let mut params = rustix::io_uring::io_uring_params::default();
    // SAFETY: default parameters ask for a plain ring; the ring is closed at once and never used.
    unsafe { rustix::io_uring::io_uring_setup(1, &mut params) }.map(drop)
}

fn probe_anon_names() -> bool {
    const NAME: &CStr = c"uhmm:probe";
    // SAFETY: the kernel chooses an address that nothing else uses.
    let page = unsafe {
        rustix::mm::mmap_anonymous(
            core::ptr::null_mut(),
            PAGE_SIZE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    };
    let Ok(page) = page else {
        return false;
    };
    // SAFETY: the page is ours until the `munmap` below, and nothing refers to it.
    let bytes = unsafe { core::slice::from_raw_parts(page.cast::<u8>(), PAGE_SIZE) };
    let named = rustix::process::set_virtual_memory_region_name(bytes, Some(NAME)).is_ok();
    // SAFETY: it is our own mapping, and `bytes` is not used any more.
    let unmapped = unsafe { rustix::mm::munmap(page, PAGE_SIZE) };
    debug_assert!(unmapped.is_ok(), "unmapping a whole mapping of ours");
    named
}

/// A small file's text without the line feed; empty if it cannot be read.
fn read(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim_end().to_owned()).unwrap_or_default()
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> String {
    text.split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map(|(word, _)| word.to_owned())
        .unwrap_or_default()
}

fn pool(size: &str) -> HugePool {
    let number = |file| read(&format!("/sys/kernel/mm/hugepages/{size}/{file}")).parse().unwrap_or(0);
    HugePool { total: number("nr_hugepages"), free: number("free_hugepages") }
}

/// The value of a line such as `MemTotal:  1024 kB`.
fn kib_line(text: &str, name: &str) -> ByteSize {
    let value =
        text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
    ByteSize::kib(value.unwrap_or(0))
}

impl Capabilities {
    /// The table, the most important first.
    pub fn rows(&self) -> Vec<CapabilityRow> {
        let mut rows = vec![self.uffd_row()];
        let feature = |name, bit, needed_for| {
            let have = self.features.contains(bit);
            let detail = if have { "yes" } else { "the kernel lacks it" };
            row(name, have, detail, needed_for, None)
        };
        rows.extend([
            feature("uffd move", Features::MOVE, "moving frames without copying (Linux 6.8)"),
            feature("uffd write-protect", Features::WP, "copying out without losing writes (Linux 5.7)"),
            feature(
                "uffd write-protect async",
                Features::WP_ASYNC,
                "nothing yet: telling of writes without faults",
            ),
            feature("uffd sigbus", Features::SIGBUS, "faults resolved by the faulting thread; the arena"),
            feature("uffd poison", Features::POISON, "pages that are lost raise SIGBUS (Linux 6.6)"),
            feature("uffd remap events", Features::EVENT_REMAP, "programs that move mappings"),
            feature("uffd remove events", Features::EVENT_REMOVE, "programs that give pages back"),
            feature("uffd unmap events", Features::EVENT_UNMAP, "programs that unmap"),
            feature("uffd thread ids", Features::THREAD_ID, "naming the thread that waits"),
            feature("uffd exact addresses", Features::EXACT_ADDRESS, "prefetching by access pattern"),
            row(
                "uffd fork events",
                self.fork_events,
                if self.fork_events { "yes" } else { "not permitted" },
                "forked children that leave the parent's pages on devices; without, all come home first",
                (!self.fork_events).then(|| "run with CAP_SYS_PTRACE, for instance with sudo".to_owned()),
            ),
        ]);
        rows.extend(self.system_rows());
        rows
    }

    fn uffd_row(&self) -> CapabilityRow {
        const SYSCTL: &str = "sudo sysctl vm.unprivileged_userfaultfd=1";
        let (have, detail, grant) = match self.uffd {
            UffdAccess::Syscall => (true, "by the system call".to_owned(), None),
            UffdAccess::DeviceNode => (true, "by /dev/userfaultfd".to_owned(), None),
            UffdAccess::UserModeOnly => {
                (false, "for faults of user code alone".to_owned(), Some(SYSCTL.to_owned()))
            }
            UffdAccess::None { syscall, device } => {
                let grant = match (syscall, device) {
                    (Errno::NOSYS, _) => None,
                    (_, Errno::ACCESS) => Some("sudo setfacl -m u:$USER:rw /dev/userfaultfd".to_owned()),
                    _ => Some(SYSCTL.to_owned()),
                };
                (false, format!("system call: {syscall}; /dev/userfaultfd: {device}"), grant)
            }
        };
        row("userfaultfd", have, detail, "everything", grant)
    }

    fn system_rows(&self) -> Vec<CapabilityRow> {
        let pool_row = |name, pool: HugePool, grant: &str| {
            let detail = format!("{} of {} free", pool.free, pool.total);
            let have = pool.total > 0;
            row(name, have, detail, "hugetlb memory on devices", (!have).then(|| grant.to_owned()))
        };
        let thp = !matches!(self.thp.as_str(), "" | "never");
        let shmem_thp = !matches!(self.shmem_thp.as_str(), "" | "never" | "deny");
        let io_uring = match self.io_uring {
            Ok(()) => "yes".to_owned(),
            Err(errno) => errno.to_string(),
        };
        let traced = self.ptrace_scope.unwrap_or(0) == 0 || self.euid == 0;
        vec![
            row(
                "pagemap scan",
                self.pagemap_scan,
                if self.pagemap_scan { "yes" } else { "absent; page map entries are read instead" },
                "finding pages with contents fast (Linux 6.7)",
                None,
            ),
            row(
                "io_uring",
                self.io_uring.is_ok(),
                io_uring,
                "file and block devices at full speed",
                (self.io_uring == Err(Errno::PERM))
                    .then(|| "sudo sysctl kernel.io_uring_disabled=0".to_owned()),
            ),
            row(
                "transparent huge pages",
                thp,
                word(&self.thp),
                "2 MiB at a time",
                (!thp && !self.thp.is_empty()).then(|| {
                    "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled".to_owned()
                }),
            ),
            row(
                "huge pages in shared memory",
                shmem_thp,
                word(&self.shmem_thp),
                "2 MiB at a time in coherent devices",
                (!shmem_thp && !self.shmem_thp.is_empty()).then(|| {
                    "echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled".to_owned()
                }),
            ),
            pool_row("hugetlb 2 MiB", self.hugetlb_2m, "sudo sysctl vm.nr_hugepages=64"),
            pool_row(
                "hugetlb 1 GiB",
                self.hugetlb_1g,
                "echo 1 | sudo tee /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
            ),
            row(
                "swap",
                self.swap > ByteSize::default(),
                self.swap.to_string(),
                "nothing; said for the record",
                None,
            ),
            row(
                "names of anonymous mappings",
                self.anon_names,
                if self.anon_names { "yes" } else { "the kernel lacks CONFIG_ANON_VMA_NAME" },
                "telling our mappings from the program's",
                None,
            ),
            row(
                "tracing other processes",
                traced,
                match self.ptrace_scope {
                    Some(scope) => format!("kernel.yama.ptrace_scope={scope}, user {}", self.euid),
                    None => format!("no Yama, user {}", self.euid),
                },
                "attaching to a program that runs",
                (!traced).then(|| "sudo sysctl kernel.yama.ptrace_scope=0".to_owned()),
            ),
            row(
                "many mappings",
                self.max_map_count >= 65_530,
                format!("vm.max_map_count={}", self.max_map_count),
                "programs with many mappings",
                (self.max_map_count < 65_530).then(|| "sudo sysctl vm.max_map_count=262144".to_owned()),
            ),
            row(
                "reserving address space",
                self.overcommit != 2,
                format!("vm.overcommit_memory={}", self.overcommit),
                "large tables that are mostly empty",
                (self.overcommit == 2).then(|| "sudo sysctl vm.overcommit_memory=0".to_owned()),
            ),
            row(
                "a second processor",
                self.cpus > 1,
                format!("{} processors, {} of memory", self.cpus, self.memory),
                "handler threads that do not slow the program",
                None,
            ),
        ]
    }
}

fn word(text: &str) -> &str {
    if text.is_empty() { "unknown" } else { text }
}

fn row(
    name: &'static str,
    have: bool,
    detail: impl Into<String>,
    needed_for: &'static str,
    grant: Option<String>,
) -> CapabilityRow {
    CapabilityRow { name, have, detail: detail.into(), needed_for, grant }
}
