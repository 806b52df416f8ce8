//! Fault-around: how many pages one fault brings home.
//!
//! What   [`Windows`] remembers a few streams of faults. A fault about where a stream would go on doubles that
//!        stream's window; any other fault starts one with the window of random access.
//! Until  a window is as long as they go, or, from 64 pages on, as long as a quarter of what the stream has
//!        come by: what is read in vain behind the end of a stretch is a part of the stretch, and small.
//! Why    reading one page at random costs the latency of the device, reading them in order should cost
//!        its bandwidth.
//! Which  streams that went on at least once are kept apart from those that began a moment ago: a program
//!        that walks one array while it looks things up at random in another is the common case, and the
//!        random faults must not push the walk out.
//! Races  the streams are hints in relaxed atomics; a lost update costs a smaller window, never more.

use uhmm_addr::{PageCount, Vpn};

use crate::sync::{AtomicU64, AtomicUsize, Ordering};

const STREAMS: usize = 8;
/// Pages that a stream may skip, however short its last window: some pages of a sequence are in RAM.
const SKIP: usize = 4;
/// Windows up to here grow with each fault; longer ones with what is behind them.
const TRUSTED: usize = 64;
/// A window longer than [`TRUSTED`] is at most this part of its stream.
const PART: usize = 4;

/// Which way a sequence goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// To higher addresses: the window begins at the page that was touched.
    Up,
    /// To lower addresses: the window ends there.
    Down,
}

/// What to bring home for a fault: so many pages, the touched one included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// How many, at least one.
    pub pages: PageCount,
    /// Which way from the touched page.
    pub direction: Direction,
}

const LEN_BITS: u32 = 10;
const LEN_MASK: u64 = (1 << LEN_BITS) - 1;
const RUN_SHIFT: u32 = LEN_BITS;
const RUN_BITS: u32 = LEN_BITS + PART.ilog2();
const RUN_MASK: u64 = (1 << RUN_BITS) - 1;
const DOWN: u64 = 1 << (RUN_SHIFT + RUN_BITS);
const PAGE_SHIFT: u32 = RUN_SHIFT + RUN_BITS + 1;

/// One stream, in a word: the last page of its last window, the window's length, how many pages it has come by up to
/// that window (or more than matters), and its direction. A stream that began with one fault goes up or down as its
/// second fault says.
#[derive(Clone, Copy)]
struct Stream {
    last: usize,
    len: usize,
    run: usize,
    direction: Direction,
}

impl Stream {
    fn unpack(word: u64) -> Option<Self> {
        let len = (word & LEN_MASK) as usize;
        let run = (word >> RUN_SHIFT & RUN_MASK) as usize;
        let direction = if word & DOWN == 0 { Direction::Up } else { Direction::Down };
        (len > 0).then_some(Self { last: (word >> PAGE_SHIFT) as usize, len, run, direction })
    }

    const fn pack(self) -> u64 {
        let down = match self.direction {
            Direction::Up => 0,
            Direction::Down => DOWN,
        };
        (self.last as u64) << PAGE_SHIFT | down | (self.run as u64) << RUN_SHIFT | self.len as u64
    }

    /// The direction in which `page` continues the stream, if it does.
    fn continued_by(self, page: usize, proven: bool) -> Option<Direction> {
        // Two pages near each other are no sequence yet; two side by side may be.
        let reach = if proven { self.len.max(SKIP) + 1 } else { 1 };
        let direction = if page > self.last { Direction::Up } else { Direction::Down };
        let near = page != self.last && page.abs_diff(self.last) <= reach;
        (near && (!proven || direction == self.direction)).then_some(direction)
    }
}

/// A few streams.
#[derive(Debug)]
struct Streams {
    entries: [AtomicU64; STREAMS],
    victim: AtomicUsize,
    proven: bool,
}

impl Streams {
    fn new(proven: bool) -> Self {
        let entries = core::array::from_fn(|_| AtomicU64::new(0));
        Self { entries, victim: AtomicUsize::new(0), proven }
    }

    /// The stream that `page` continues, its last window, and which way it goes.
    fn continued_by(&self, page: Vpn) -> Option<(&AtomicU64, Stream)> {
        self.entries.iter().find_map(|word| {
            let stream = Stream::unpack(word.load(Ordering::Relaxed))?;
            let direction = stream.continued_by(page.get(), self.proven)?;
            Some((word, Stream { direction, ..stream }))
        })
    }

    fn insert(&self, stream: Stream) {
        let victim = self.victim.fetch_add(1, Ordering::Relaxed) % STREAMS;
        self.entries[victim].store(stream.pack(), Ordering::Relaxed);
    }
}

/// The window policy of an address space.
#[derive(Debug)]
pub struct Windows {
    begun: Streams,
    proven: Streams,
    random: usize,
    most: usize,
    fill: usize,
}

/// The most pages that one fault on fresh memory fills.
pub(super) const FILL_WINDOW: usize = 16;

impl Windows {
    /// Windows of `random` pages at random access, growing to `most` in sequences.
    pub fn new(random: PageCount, most: PageCount) -> Self {
        let most = most.get().clamp(1, LEN_MASK as usize);
        let random = random.get().clamp(1, most);
        let fill = FILL_WINDOW;
        Self { begun: Streams::new(false), proven: Streams::new(true), random, most, fill }
    }

    /// No fault-around: a fault is about the page that was touched and no other, fresh memory included.
    pub fn one_by_one() -> Self {
        Self { fill: 1, ..Self::new(PageCount::ONE, PageCount::ONE) }
    }

    /// Pages of fresh memory that one fault fills at most.
    pub(super) const fn fill(&self) -> usize {
        self.fill
    }

    /// What to bring home for a fault on `page`.
    pub fn on_fault(&self, page: Vpn) -> Window {
        let (stream, known) = if let Some((word, stream)) = self.proven.continued_by(page) {
            (stream, Some(word))
        } else if let Some((word, stream)) = self.begun.continued_by(page) {
            word.store(0, Ordering::Relaxed);
            (stream, None)
        } else {
            let len = self.random;
            let last = page.get() + len - 1;
            self.begun.insert(Stream { last, len, run: len, direction: Direction::Up });
            return Window { pages: PageCount::new(len), direction: Direction::Up };
        };
        let trusted = (stream.run / PART).max(TRUSTED);
        let len = (stream.len * 2).min(trusted).min(self.most);
        let next = stream.moved_to(page, len);
        match known {
            Some(word) => word.store(next.pack(), Ordering::Relaxed),
            None => self.proven.insert(next),
        }
        Window { pages: PageCount::new(len), direction: stream.direction }
    }

    /// A page was needed that did not have to be fetched: a stream that goes on there goes on behind it.
    pub fn passed(&self, page: Vpn) {
        if let Some((word, stream)) = self.proven.continued_by(page) {
            word.store(stream.reaching(page.get()).pack(), Ordering::Relaxed);
        }
    }

    /// Tells the policy that the window for `page` came to `pages` only, so that the next fault of the
    /// sequence is recognised.
    pub fn clipped(&self, page: Vpn, asked: Window, pages: PageCount) {
        let last = asked.last(page);
        for word in self.proven.entries.iter().chain(&self.begun.entries) {
            let packed = word.load(Ordering::Relaxed);
            let Some(stream) = Stream::unpack(packed) else { continue };
            if stream.last != last || stream.direction != asked.direction {
                continue;
            }
            let last = Window { pages, ..asked }.last(page);
            let run = stream.run.saturating_sub(asked.pages.minus(pages).get());
            let new = Stream { last, run, ..stream };
            if word.compare_exchange(packed, new.pack(), Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }
}

impl Window {
    /// Where it ends, in its direction, if it is about `page`.
    const fn last(self, page: Vpn) -> usize {
        match self.direction {
            Direction::Up => page.get() + self.pages.get() - 1,
            Direction::Down => (page.get() + 1).saturating_sub(self.pages.get()),
        }
    }
}

impl Stream {
    /// The stream when it has come to `last`.
    fn reaching(self, last: usize) -> Self {
        let run = self.run.saturating_add(last.abs_diff(self.last)).min(RUN_MASK as usize);
        Self { last, run, ..self }
    }

    /// The stream after a window of `len` pages from `page` on.
    fn moved_to(self, page: Vpn, len: usize) -> Self {
        let window = Window { pages: PageCount::new(len), direction: self.direction };
        Self { len, ..self.reaching(window.last(page)) }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::vec::Vec;

    use super::{Direction, Windows};
    use uhmm_addr::{PageCount, Vpn};

    fn windows() -> Windows {
        Windows::new(PageCount::new(1), PageCount::new(256))
    }

    /// Touches `pages` pages from `page` on, in order: the windows it took, and the page behind the last.
    fn run(windows: &Windows, page: usize, pages: usize) -> (Vec<usize>, usize) {
        let (mut next, mut seen) = (page, Vec::new());
        while next < page + pages {
            seen.push(windows.on_fault(Vpn::new(next)).pages.get());
            next += seen[seen.len() - 1];
        }
        (seen, next)
    }

    #[test]
    fn random_faults_bring_one_page() {
        let windows = windows();
        for page in [900, 17, 40_000, 333, 80_001] {
            assert_eq!(windows.on_fault(Vpn::new(page)).pages.get(), 1);
        }
    }

    #[test]
    fn one_by_one_nothing_grows() {
        let windows = Windows::one_by_one();
        assert!((0..100).all(|page| windows.on_fault(Vpn::new(page)).pages.get() == 1));
        assert_eq!(windows.fill(), 1);
    }

    #[test]
    fn sequences_grow_to_the_limit() {
        let (seen, _) = run(&windows(), 1000, 1500);
        assert_eq!(seen[..9], [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        assert!(seen[9..].windows(2).all(|pair| pair[0] <= pair[1]), "{seen:?}");
        assert_eq!(seen[seen.len() - 1], 256);
    }

    #[test]
    fn little_is_read_behind_the_end_of_a_stretch() {
        for pages in [1, 10, 60, 250, 500, 1000, 5000] {
            let (_, end) = run(&windows(), 7_000_000, pages);
            let vain = end - 7_000_000 - pages;
            assert!(vain < 64.max(pages / 4), "{vain} behind {pages}");
        }
    }

    #[test]
    fn what_is_clipped_does_not_count_as_gone_by() {
        let windows = windows();
        let mut page = 0x400;
        for _ in 0..6 {
            page += windows.on_fault(Vpn::new(page)).pages.get();
        }
        for _ in 0..100 {
            let asked = windows.on_fault(Vpn::new(page));
            assert!(asked.pages.get() <= 64.max((page - 0x400) / 4), "{asked:?} at {page:#x}");
            windows.clipped(Vpn::new(page), asked, PageCount::new(3));
            page += 3;
        }
    }

    #[test]
    fn random_faults_do_not_push_a_sequence_out() {
        let windows = windows();
        let mut page = 1000;
        for round in 0..20 {
            page += windows.on_fault(Vpn::new(page)).pages.get();
            for n in 0..20 {
                windows.on_fault(Vpn::new(1_000_000 + 1000 * (37 * n + round) % 77_777));
            }
            if round == 0 {
                page += windows.on_fault(Vpn::new(page)).pages.get();
            }
        }
        assert_eq!(windows.on_fault(Vpn::new(page)).pages.get(), 256);
    }

    #[test]
    fn sequences_to_lower_addresses_grow_as_well() {
        let windows = windows();
        let mut page = 100_000;
        let mut seen = Vec::new();
        for _ in 0..8 {
            let window = windows.on_fault(Vpn::new(page));
            seen.push((window.pages.get(), window.direction));
            page -= window.pages.get();
        }
        let lens: Vec<_> = seen.iter().map(|(len, _)| *len).collect();
        assert_eq!(lens, [1, 2, 4, 8, 16, 32, 64, 64]);
        assert!(seen[1..].iter().all(|(_, direction)| *direction == Direction::Down));
    }

    #[test]
    fn two_interleaved_sequences_both_grow() {
        let windows = windows();
        let (mut a, mut b) = (1000, 900_000);
        for _ in 0..8 {
            a += windows.on_fault(Vpn::new(a)).pages.get();
            b += windows.on_fault(Vpn::new(b)).pages.get();
        }
        assert_eq!(windows.on_fault(Vpn::new(a)).pages.get(), 64);
        assert_eq!(windows.on_fault(Vpn::new(b)).pages.get(), 64);
    }

    #[test]
    fn a_clipped_window_goes_on_where_it_ended() {
        let windows = windows();
        let mut page = 0x400;
        for _ in 0..6 {
            page += windows.on_fault(Vpn::new(page)).pages.get();
        }
        let asked = windows.on_fault(Vpn::new(page));
        windows.clipped(Vpn::new(page), asked, PageCount::new(3));
        assert_eq!(windows.on_fault(Vpn::new(page + 3)).pages.get(), 64);
    }
}
