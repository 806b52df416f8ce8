//! The machine of this process, and what its descriptors stand for.
//!
//! What    [`State::get`], the machine if there is one; [`State::need`] makes it. [`Files`] says what is behind a
//!         descriptor: a memfd, so that it can be closed and mapped.
//! Owns    the machine, for as long as the process lives: a program's pages may be on its devices to the end.
//! Locks   one around the list of descriptors, held for a look only.
//! Fork    the child forgets it all ([`State::forget`]): its threads, and who held the lock, are the parent's.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uhmm::space::Builder;
use uhmm::{ByteSize, Space};
use uhmm_dmirror::{Dmirror, Handle};

/// What a device can hold. Its memory is taken where it is used.
const DEVICE: ByteSize = ByteSize::gib(1);

/// What is behind a descriptor.
#[derive(Clone)]
pub enum File {
    /// A device.
    Device(Arc<Handle<'static>>),
    /// `gup_test`.
    Gup,
}

pub type Files = BTreeMap<c_int, File>;

/// What this process has.
pub struct State {
    pub machine: Dmirror,
    files: Mutex<Files>,
}

/// Set to 1, it has the machine behave as on a kernel that cannot move frames.
const FALLBACK: &str = "UHMM_FORCED_FALLBACK";

fn builder() -> Builder {
    Space::builder().forced_fallback(std::env::var_os(FALLBACK).is_some_and(|value| value == "1"))
}

static STATE: AtomicPtr<State> = AtomicPtr::new(ptr::null_mut());
/// Whoever makes the machine.
static MAKING: Mutex<()> = Mutex::new(());

impl State {
    /// The machine, if anything of it was opened.
    pub fn get() -> Option<&'static Self> {
        // SAFETY: null, or leaked for good by `need`.
        unsafe { STATE.load(Ordering::Acquire).as_ref() }
    }

    /// The machine, made if need be.
    pub fn need() -> Option<&'static Self> {
        let _making = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = Self::get() {
            return Some(state);
        }
        // SAFETY: the program decides which addresses a device is asked about, as with the kernel's, and is no Rust
        // program that would hold references to them; this library's own memory is apart from its heap.
        let machine = match unsafe { Dmirror::with(builder(), DEVICE) } {
            Ok(machine) => machine,
            Err(error) => {
                eprintln!("uhmm-dmirror: {error}");
                return None;
            }
        };
        STATE.store(Box::leak(Box::new(Self { machine, files: Mutex::default() })), Ordering::Release);
        Self::get()
    }

    /// In the child of a fork: there is no machine.
    pub fn forget() {
        STATE.store(ptr::null_mut(), Ordering::Release);
    }

    /// The descriptors.
    pub fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is behind `fd`, if it is one of ours.
    pub fn file(fd: c_int) -> Option<(&'static Self, File)> {
        let state = Self::get()?;
        let file = state.files().get(&fd).cloned()?;
        Some((state, file))
    }
}
