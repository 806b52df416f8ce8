//! Which mappings are put under management, and how much memory the process uses.
//!
//! Adopted are private anonymous mappings, whole: registering a part would split the mapping, and `mremap`
//! on a split one fails. Left alone are uhmm's own memory, the main stack, and the static data of the
//! libraries that the agent's threads call.
//!
//! *When may a page be taken out?* Only while its mapping is registered, for otherwise a touch of it is
//! filled with zeros by the kernel. A mapping counts as registered if a scan shows it with exactly the bounds
//! with which an earlier scan registered it, and no event since then said that some of it went away: had any
//! part been replaced in between, that part would be a mapping by itself.

use std::io;
use std::time::{Duration, Instant};

use uhmm::reclaim::Gauge;
use uhmm_addr::{PAGE_SIZE, PageCount, VaRange};
use uhmm_core::mm::Epoch;
use uhmm_sys::mapping::{self, Mapping};
use uhmm_sys::maps::{MapEntry, MapsReader};
use uhmm_sys::meter::Meter;
use uhmm_sys::uffd::Mode;

use crate::fork::Adopting;
use crate::process::Agent;

/// Least time between two scans of the mappings.
const PAUSE: Duration = Duration::from_millis(1);
/// Libraries whose static data the agent's threads use.
const LIBRARIES: [&[u8]; 4] = [b"libc.so", b"ld-linux", b"uhmm", b"libgcc_s"];

/// Measures and adopts the memory of this process.
pub struct ProcessGauge {
    agent: &'static Agent,
    meter: Meter,
    maps: MapsReader,
    /// What was registered, by address, and is evictable since `since`.
    registered: Vec<VaRange>,
    since: Epoch,
    candidates: Vec<VaRange>,
    last: Option<Instant>,
    /// A page that is registered from the first adoption on and inherited by children, so that every fork
    /// raises its event, whatever the program has unmapped.
    sentinel: Option<Mapping>,
}

impl ProcessGauge {
    pub fn open(agent: &'static Agent) -> io::Result<Self> {
        Ok(Self {
            agent,
            meter: Meter::open()?,
            maps: MapsReader::open()?,
            registered: Vec::new(),
            since: agent.managed.mm().epoch(),
            candidates: Vec::new(),
            last: None,
            sentinel: None,
        })
    }

    /// One scan: registers what is new, keeps as evictable what was registered before. Says whether
    /// anything was new.
    fn scan(&mut self) -> bool {
        let mm = self.agent.managed.mm();
        let _adopting = Adopting::begin();
        if self.sentinel.is_none() {
            self.sentinel = Mapping::reserve(PAGE_SIZE, "uhmm-sentinel").ok();
            if let Some(sentinel) = &self.sentinel {
                // SAFETY: a page of our own that nobody touches.
                let _ = unsafe { mm.host().program().register(sentinel.range(), Mode::MISSING_AND_WP) };
            }
        }
        let now = mm.epoch();
        let since = self.since;
        self.registered.retain(|range| !mm.changed_since(since, *range));
        self.since = now;
        let candidates = &mut self.candidates;
        candidates.clear();
        let mut library = None;
        let scanned = self.maps.for_each(|entry| {
            let behind_library = library == Some(entry.range.end_page());
            if let Some(end) = library_end(&entry) {
                library = Some(end);
            } else if library == Some(entry.range.first()) && entry.inode == 0 {
                // Static data without contents in the file, right behind it.
                library = None;
            } else if !behind_library && is_candidate(&entry) {
                candidates.push(entry.range);
            }
        });
        if scanned.is_err() {
            return false;
        }
        let mut fresh = false;
        let mut evictable = Vec::with_capacity(candidates.len());
        for range in &*candidates {
            if self
                .registered
                .binary_search_by_key(&range.first(), |known| known.first())
                .is_ok_and(|at| self.registered[at] == *range)
            {
                evictable.push(*range);
                continue;
            }
            // SAFETY: the range is the program's own memory, not ours (`is_candidate`), and the handlers of
            // this process serve it as long as the process lives.
            if unsafe { mm.host().program().register(*range, Mode::MISSING_AND_WP) }.is_ok() {
                fresh = true;
            }
        }
        self.registered.clear();
        self.registered.extend_from_slice(candidates);
        self.agent.managed.set_ranges(&evictable, now);
        fresh
    }
}

/// Where a mapping of one of the libraries ends.
fn library_end(entry: &MapEntry<'_>) -> Option<uhmm_addr::Vpn> {
    let name = entry.path.rsplit(|byte| *byte == b'/').next().unwrap_or(entry.path);
    let ours = entry.inode != 0 && LIBRARIES.iter().any(|library| contains(name, library));
    ours.then(|| entry.range.end_page())
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn is_candidate(entry: &MapEntry<'_>) -> bool {
    let anonymous = entry.inode == 0
        && (entry.path.is_empty() || entry.path == b"[heap]" || entry.path.starts_with(b"[anon:"));
    anonymous && !entry.shared && (entry.read || entry.write) && !mapping::is_ours(entry.range)
}

impl Gauge for ProcessGauge {
    fn resident(&mut self) -> io::Result<PageCount> {
        self.meter.resident_anonymous()
    }

    fn adopt(&mut self) {
        if self.last.is_some_and(|last| last.elapsed() < PAUSE) {
            return;
        }
        // What the first scan registers, the second one finds registered.
        if self.scan() {
            self.scan();
        }
        self.last = Some(Instant::now());
    }
}
