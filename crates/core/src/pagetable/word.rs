//! The page word: everything that is known about one page, in 64 bits.
//!
//! ```text
//!   63  56 55      16 15   12 11  10  9   8   7   6   5   4   3     0
//!  +------+----------+-------+------+---+---+---+---+---+---+--------+
//!  | age  | payload  | reuse | kind | W | T | P | D | I | w | state  |
//!  +------+----------+-------+------+---+---+---+---+---+---+--------+
//! ```
//!
//! `w` waited, `I` installed, `D` discarded, `P` pinned, `T` tracked, `W` writing; `kind` says where a moving page comes from,
//! `reuse` how much is evicted before the page is touched again once it is away ([`Reuse`]), `age` when it left for
//! the device.
//! The all-zero word is a valid one: [`State::Empty`].

use core::fmt;

use uhmm_addr::Pfn;

use super::reuse::{Reuse, away};
use crate::frame::Slot;

/// Where a page is (rule R2). Each value, and what the payload holds:
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// Nothing is known: the page may be present or not, and no copy of it is ours. Payload: none.
    Empty = 0,
    /// In RAM, brought home by us. Payload: if tracked, the device page that still equals it.
    Resident = 1,
    /// On a device, and absent; a touch brings it home, or maps it in place. Payload: its pfn.
    Device = 2,
    /// On a coherent device, mapped in place. Payload: its pfn.
    Coherent = 3,
    /// Lent to a device, which alone may touch it, in an arena slot; a CPU access takes it back. Payload: the slot.
    Exclusive = 4,
    /// In an arena slot on its way out; a touch takes it back. Payload: the slot.
    Staged = 5,
    /// Claimed by one thread, which alone may change the word, except for the waited and discarded flags.
    /// Payload: by [`Kind`].
    Moving = 6,
    /// Lost: the device could not give it back. A touch raises SIGBUS. Payload: none.
    Poisoned = 7,
}

/// Which way a [`State::Moving`] page goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// From the device to RAM. Payload: the pfn, whose contents stay valid until the move is over.
    In = 0,
    /// From the arena back to RAM. Payload: the slot.
    Back = 1,
    /// From RAM into the arena. Payload: the slot.
    Out = 2,
    /// From nowhere to RAM: being filled with zeros. Payload: none.
    Fill = 3,
}

/// A page word as a value: a fact that was true when it was read.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct PageWord(u64);

const STATE: u64 = 0xf;
const WAITED: u64 = 1 << 4;
const INSTALLED: u64 = 1 << 5;
const REUSE_SHIFT: u32 = 12;
const REUSE: u64 = 15 << REUSE_SHIFT;
const DISCARDED: u64 = 1 << 6;
const PINNED: u64 = 1 << 7;
const TRACKED: u64 = 1 << 8;
const WRITING: u64 = 1 << 9;
const KIND_SHIFT: u32 = 10;
const PAYLOAD_SHIFT: u32 = 16;
const PAYLOAD: u64 = ((1 << Pfn::BITS) - 1) << PAYLOAD_SHIFT;
const AGE_SHIFT: u32 = PAYLOAD_SHIFT + Pfn::BITS;
const AGE: u64 = 0xff << AGE_SHIFT;

impl PageWord {
    /// The initial word of every page.
    pub const EMPTY: Self = Self(0);
    /// In RAM, without a copy anywhere.
    pub const RESIDENT: Self = Self::of(State::Resident, 0);
    /// The same, put there by ourselves as a small page of the process's own, with nothing in a store's way.
    pub const INSTALLED: Self = Self(Self::RESIDENT.0 | INSTALLED);
    /// Lost.
    pub const POISONED: Self = Self::of(State::Poisoned, 0);

    const fn of(state: State, payload: u64) -> Self {
        Self(state as u64 | payload << PAYLOAD_SHIFT)
    }

    /// The word for this raw value, as stored in a table.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    /// The raw value, as stored in a table.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// On the device page `pfn`, and absent.
    pub const fn device(pfn: Pfn) -> Self {
        Self::of(State::Device, pfn.get())
    }

    /// On the coherent device page `pfn`, mapped in place.
    pub const fn coherent(pfn: Pfn) -> Self {
        Self::of(State::Coherent, pfn.get())
    }

    /// In RAM, write-protected, and equal to the device page `pfn`.
    pub const fn tracked(pfn: Pfn) -> Self {
        Self(Self::of(State::Resident, pfn.get()).0 | TRACKED)
    }

    /// In arena slot `slot`.
    pub const fn staged(slot: Slot) -> Self {
        Self::of(State::Staged, slot.get() as u64)
    }

    /// In arena slot `slot`, lent to a device.
    pub const fn exclusive(slot: Slot) -> Self {
        Self::of(State::Exclusive, slot.get() as u64)
    }

    /// On its way from the device page `pfn`.
    pub const fn moving_in(pfn: Pfn) -> Self {
        Self(Self::of(State::Moving, pfn.get()).0 | (Kind::In as u64) << KIND_SHIFT)
    }

    /// On its way back from arena slot `slot`.
    pub const fn moving_back(slot: Slot) -> Self {
        Self(Self::of(State::Moving, slot.get() as u64).0 | (Kind::Back as u64) << KIND_SHIFT)
    }

    /// On its way to arena slot `slot`.
    pub const fn moving_out(slot: Slot) -> Self {
        Self(Self::of(State::Moving, slot.get() as u64).0 | (Kind::Out as u64) << KIND_SHIFT)
    }

    /// Being filled with zeros.
    pub const fn filling() -> Self {
        Self(Self::of(State::Moving, 0).0 | (Kind::Fill as u64) << KIND_SHIFT)
    }

    /// Where the page is.
    pub const fn state(self) -> State {
        match self.0 & STATE {
            0 => State::Empty,
            1 => State::Resident,
            2 => State::Device,
            3 => State::Coherent,
            4 => State::Exclusive,
            5 => State::Staged,
            6 => State::Moving,
            // Every other value is written by nobody; calling it lost never serves wrong bytes.
            _ => State::Poisoned,
        }
    }

    /// Which way it goes, if it moves.
    pub const fn kind(self) -> Option<Kind> {
        match (self.state(), self.0 >> KIND_SHIFT & 3) {
            (State::Moving, 0) => Some(Kind::In),
            (State::Moving, 1) => Some(Kind::Back),
            (State::Moving, 2) => Some(Kind::Out),
            (State::Moving, _) => Some(Kind::Fill),
            _ => None,
        }
    }

    const fn payload(self) -> u64 {
        (self.0 & PAYLOAD) >> PAYLOAD_SHIFT
    }

    /// The device page that holds (or also holds) the contents.
    pub const fn pfn(self) -> Option<Pfn> {
        match (self.state(), self.kind()) {
            (State::Device | State::Coherent, _) | (State::Moving, Some(Kind::In)) => {
                Some(Pfn::new(self.payload()))
            }
            (State::Resident, _) if self.is_tracked() => Some(Pfn::new(self.payload())),
            _ => None,
        }
    }

    /// The arena slot that holds, or is to hold, the contents.
    pub const fn slot(self) -> Option<Slot> {
        match (self.state(), self.kind()) {
            (State::Staged | State::Exclusive, _) | (State::Moving, Some(Kind::Back | Kind::Out)) => {
                Some(Slot::new(self.payload() as u32))
            }
            _ => None,
        }
    }

    /// Whether the page is in RAM if it is there at all, and what is there is not given up: nothing but the system's page
    /// map tells more. Flags of several words are at home together if each of them is.
    pub const fn is_at_home(self) -> bool {
        const AWAY: u64 = STATE & !(State::Resident as u64) | DISCARDED;
        const { assert!(State::Empty as u64 == 0 && State::Resident as u64 == 1) };
        self.0 & AWAY == 0
    }

    /// Whether the page was put where it is by ourselves, as a small page of the process's own, and nothing that we hear
    /// of has happened to it since. Worth something where the host tells of the program's own changes
    /// ([`Host::hears`](crate::host::Host::hears)) only.
    pub const fn is_installed(self) -> bool {
        self.0 & (STATE | INSTALLED | DISCARDED | TRACKED) == Self::INSTALLED.0
    }

    /// Whether that is so of several words, in one step: of what all of them have, and of what any has.
    pub(super) const fn are_installed(all: u64, any: u64) -> bool {
        Self(all).is_installed() && Self(any).is_installed()
    }

    /// The same; whether it is where it was put is not known any more.
    pub const fn without_installed(self) -> Self {
        Self(self.0 & !INSTALLED)
    }

    /// Whether the page is on a device, and nowhere else.
    pub const fn is_on_device(self) -> bool {
        matches!(self.state(), State::Device | State::Coherent)
    }

    /// Somebody waits for the end of the move and must be woken.
    pub const fn is_waited(self) -> bool {
        self.0 & WAITED != 0
    }

    /// What is known of the page's reuse distance.
    pub(crate) const fn reuse(self) -> Reuse {
        Reuse::from_bits(self.0 >> REUSE_SHIFT)
    }

    const fn with_reuse(self, reuse: Reuse) -> Self {
        Self(self.0 & !REUSE | reuse.bits() << REUSE_SHIFT)
    }

    /// The distance after which the page is expected to be touched, in the units of [`Reuse`], when the clock of
    /// evictions says `now`: a page that is away for longer than that by now is not expected so soon.
    pub(crate) const fn distance(self, now: u8) -> u32 {
        let known = self.reuse().units();
        match self.state() {
            State::Device => {
                let away = away(now.wrapping_sub((self.0 >> AGE_SHIFT) as u8));
                if away > known { away } else { known }
            }
            _ => known,
        }
    }

    /// The program gave the contents up (`MADV_DONTNEED`, munmap), perhaps a moment before the kernel
    /// takes the page: it may not be moved out, and comes back as zeros.
    pub const fn is_discarded(self) -> bool {
        self.0 & DISCARDED != 0
    }

    /// Must stay in RAM.
    pub const fn is_pinned(self) -> bool {
        self.0 & PINNED != 0
    }

    /// In RAM, write-protected, and equal to a device page.
    pub const fn is_tracked(self) -> bool {
        self.0 & TRACKED != 0
    }

    /// Staged, and a device reads the slot right now.
    pub const fn is_writing(self) -> bool {
        self.0 & WRITING != 0
    }

    /// The same with the waited flag.
    pub const fn with_waited(self) -> Self {
        Self(self.0 | WAITED)
    }

    /// The same, touched when it had just been put out of the way.
    pub const fn hotter(self) -> Self {
        self.with_reuse(self.reuse().shorter())
    }

    /// The same, on the device since the clock of evictions said `age`.
    pub const fn aged(self, age: u8) -> Self {
        Self(self.0 & !AGE | (age as u64) << AGE_SHIFT)
    }

    /// The same, on the device and touched when the clock of evictions says `now`.
    pub const fn refaulted(self, now: u8) -> Self {
        let left = (self.0 >> AGE_SHIFT) as u8;
        self.with_reuse(self.reuse().and(now.wrapping_sub(left)))
    }

    /// The same without what is remembered of its past: where it is and what holds for it now.
    pub const fn without_past(self) -> Self {
        Self(self.0 & !REUSE & !AGE)
    }

    /// The same, with the past of `other`.
    pub const fn with_past_of(self, other: Self) -> Self {
        Self(self.without_past().0 | other.0 & (REUSE | AGE))
    }

    /// The same, reused like `other`.
    pub const fn reused_like(self, other: Self) -> Self {
        self.with_reuse(other.reuse())
    }

    /// The same, its contents given up.
    pub const fn with_discarded(self) -> Self {
        Self(self.without_installed().0 | DISCARDED)
    }

    /// The same, no longer given up.
    pub const fn without_discarded(self) -> Self {
        Self(self.0 & !DISCARDED)
    }

    /// The same, pinned or not.
    pub const fn with_pinned(self, pinned: bool) -> Self {
        Self(if pinned { self.0 | PINNED } else { self.0 & !PINNED })
    }

    /// The same, with the device reading the slot or not.
    pub const fn with_writing(self, writing: bool) -> Self {
        Self(if writing { self.0 | WRITING } else { self.0 & !WRITING })
    }

    /// The same, for the claim on a page whose word was `word`: it stays pinned, and what was tracked, and
    /// may be present for all we know, is still told apart from what is on the device only; its past goes with it.
    pub const fn claimed_from(self, word: Self) -> Self {
        Self(self.0 & !AGE | word.0 & (PINNED | TRACKED | REUSE | AGE))
    }

    /// The same without the copy on the device.
    pub const fn without_copy(self) -> Self {
        Self(self.without_installed().0 & !TRACKED & ((1 << PAYLOAD_SHIFT) - 1))
    }

    /// Whether a page in this state may be moved out, if it is present.
    pub const fn may_leave(self) -> bool {
        matches!(self.state(), State::Empty | State::Resident) && !self.is_discarded() && !self.is_pinned()
    }
}

impl fmt::Debug for PageWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.state())?;
        if let Some(kind) = self.kind() {
            write!(f, "({kind:?})")?;
        }
        if let Some(pfn) = self.pfn() {
            write!(f, " {pfn:?}")?;
        }
        if let Some(slot) = self.slot() {
            write!(f, " slot {}", slot.get())?;
        }
        for (set, name) in [
            (self.is_waited(), "waited"),
            (self.is_installed(), "installed"),
            (self.is_discarded(), "discarded"),
            (self.is_pinned(), "pinned"),
            (self.is_tracked(), "tracked"),
            (self.is_writing(), "writing"),
        ] {
            if set {
                write!(f, " {name}")?;
            }
        }
        Ok(())
    }
}
