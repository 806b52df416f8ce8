//! Stacks for signal handlers.
//!
//! What     [`Stack`] lends its memory to one call at a time.
//! Why      a handler runs on whatever stack the program has for signals: 8 KiB are common, of which the
//!          kernel's frame with the processor's wide registers takes half. What a fault takes is more.
//! Owns     its memory, with a page below that nobody may touch: running over the end is a fault, not a
//!          corruption.
//! Fails    [`Stack::several`], for want of memory.

use core::arch::naked_asm;
use core::ffi::c_void;
use std::io;
use std::sync::Arc;

use rustix::mm::{MprotectFlags, mprotect};

use crate::mapping::Mapping;

const SIZE: usize = 256 << 10;
const GUARD: usize = 4096;

/// A stack.
#[derive(Debug)]
pub struct Stack {
    memory: Arc<Mapping>,
    /// Bytes of the memory up to this stack's end.
    end: usize,
}

struct Call<F, R> {
    function: Option<F>,
    result: Option<R>,
}

impl Stack {
    /// So many stacks of 256 KiB each.
    pub fn several<const N: usize>() -> io::Result<[Self; N]> {
        let memory = Arc::new(Mapping::reserve(N * SIZE, "uhmm-stack")?);
        memory.advise_no_huge()?;
        for n in 0..N {
            // SAFETY: a page of fresh memory of ours.
            unsafe {
                mprotect(memory.as_ptr().as_ptr().add(n * SIZE).cast(), GUARD, MprotectFlags::empty())
            }?;
        }
        Ok(core::array::from_fn(|n| Self { memory: memory.clone(), end: (n + 1) * SIZE }))
    }

    /// Calls `function` on this stack. A panic in it ends the process.
    ///
    /// # Safety
    /// Nobody else uses the stack meanwhile, and no signal handler may run that looks for the bounds of the
    /// thread's stack: signals are to be blocked.
    pub unsafe fn run<R, F: FnOnce() -> R>(&self, function: F) -> R {
        extern "C" fn call<R, F: FnOnce() -> R>(argument: *mut c_void) {
            // SAFETY: the caller below passes its own `Call`, which it does not touch meanwhile.
            let call = unsafe { &mut *argument.cast::<Call<F, R>>() };
            call.result = call.function.take().map(|function| function());
        }
        let mut this = Call { function: Some(function), result: None };
        // SAFETY: the end of a mapping is aligned as a stack must be; the memory below it is this stack's.
        unsafe {
            let top = self.memory.as_ptr().as_ptr().add(self.end);
            switch(top, call::<R, F>, (&raw mut this).cast());
        }
        this.result.expect("the call has returned")
    }
}

/// Calls `function` with `argument` on the stack that ends at `top`.
#[unsafe(naked)]
unsafe extern "C" fn switch(top: *mut u8, function: extern "C" fn(*mut c_void), argument: *mut c_void) {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "mov rsp, rdi",
        "mov rdi, rdx",
        "call rsi",
        "mov rsp, rbp",
        "pop rbp",
        "ret",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_addr::VirtAddr;

    #[test]
    fn a_call_runs_on_the_stack_and_returns() {
        let [_, stack, _] = Stack::several().unwrap();
        let (a, b) = (vec![1, 2, 3], 4.5_f64);
        for _ in 0..2 {
            // SAFETY: the stack is this test's; no handler of this process looks for stacks.
            let (inside, sum) = unsafe {
                stack.run(|| {
                    let local = [0_u8; 64 << 10];
                    let at = VirtAddr::of(core::hint::black_box(&local));
                    (stack.memory.range().contains(at.page()), a.iter().sum::<i32>())
                })
            };
            assert!(inside);
            assert_eq!(sum, 6);
        }
        assert!((b - 4.5).abs() < f64::EPSILON);
    }
}
