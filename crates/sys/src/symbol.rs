//! The functions behind ours: what a preloaded library calls in place of what it replaced.
//!
//! What    [`Next`]: the next definition of a name after the library that asks, looked up once, at its first use.
//! Owns    nothing; what is found stays as long as the process.
//! Fails   never: only for names that every C library has; one without them ends the process, with the name.
//! Signals a look-up takes the dynamic linker's lock; whoever may be called in a signal handler asks once before.

use std::ffi::{CStr, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The definition of a function that comes after ours (`dlsym` with `RTLD_NEXT`).
#[derive(Debug)]
pub struct Next {
    name: &'static CStr,
    function: AtomicPtr<c_void>,
}

impl Next {
    /// The function of this name, not looked up yet.
    pub const fn new(name: &'static CStr) -> Self {
        Self { name, function: AtomicPtr::new(ptr::null_mut()) }
    }

    /// Its address, never null; what type it has, the caller knows.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self) -> *mut c_void {
        let known = self.function.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: the name is a string, and a look-up changes nothing of the program's.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) };
        assert!(!found.is_null(), "the C library has no function {:?}", self.name);
        self.function.store(found, Ordering::Relaxed);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::Next;

    #[test]
    fn the_c_librarys_own_is_found_and_kept() {
        static GETPID: Next = Next::new(c"getpid");
        let function = GETPID.get();
        // SAFETY: this is its type.
        let getpid =
            unsafe { std::mem::transmute::<*mut std::ffi::c_void, extern "C" fn() -> i32>(function) };
        assert_eq!(getpid(), std::process::id() as i32);
        assert_eq!(GETPID.get(), function);
    }

    #[test]
    #[should_panic(expected = "no_such_function")]
    fn a_name_that_nobody_has_is_said() {
        Next::new(c"no_such_function").get();
    }
}
