//! Managed memory as a slice.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use uhmm_addr::VaRange;
use uhmm_sys::mapping::Mapping;

use crate::space::Inner;

/// Types for which every pattern of bytes, all zero included, is a value, and which own nothing.
///
/// # Safety
/// As said.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($type:ty)*) => {$(
        // SAFETY: every pattern of bytes is a number.
        unsafe impl Plain for $type {}
    )*};
}

plain!(u8 i8 u16 i16 u32 i32 u64 i64 u128 i128 usize isize f32 f64);

// SAFETY: an array of such values is one.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// A slice of managed memory: wherever its pages are, touching an element is all that is needed.
#[derive(Debug)]
pub struct Buffer<T: Plain> {
    inner: Arc<Inner>,
    mapping: Option<Mapping>,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    pub(crate) fn new(inner: Arc<Inner>, mapping: Mapping, len: usize) -> Self {
        debug_assert!(mapping.len() >= len * size_of::<T>());
        Self { inner, mapping: Some(mapping), len, elements: PhantomData }
    }

    fn mapping(&self) -> &Mapping {
        self.mapping.as_ref().expect("the mapping is taken by drop only")
    }

    /// The pages of the buffer.
    pub fn range(&self) -> VaRange {
        self.mapping().range()
    }

    /// The address of the first element.
    pub fn as_ptr(&self) -> *const T {
        self.mapping().as_ptr().as_ptr().cast_const().cast()
    }

    /// The address of the first element, for writing.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        self.mapping().as_ptr().as_ptr().cast()
    }

    /// Asks for huge pages where the buffer is not filled yet.
    pub fn advise_huge(&self) -> std::io::Result<()> {
        self.mapping().advise_huge()
    }

    /// Asks for pages of 4 KiB where the buffer is not filled yet.
    pub fn advise_no_huge(&self) -> std::io::Result<()> {
        self.mapping().advise_no_huge()
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping is page-aligned, long enough (`new`), and holds values of T whatever its bytes
        // are. Moving its pages about does not change what is read.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the buffer is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            self.inner.unmap(mapping);
        }
    }
}
