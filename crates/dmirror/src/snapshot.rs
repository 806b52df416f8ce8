//! What a page is, in one byte, as the kernel's `HMM_DMIRROR_PROT_*` say it.
//!
//! What    [`byte`].

use uhmm::mirror::PageView;
use uhmm::{Geometry, Owner};

use crate::Kind;

const ERROR: u8 = 0xff;
const NONE: u8 = 0x00;
const READ: u8 = 0x01;
const WRITE: u8 = 0x02;
const PMD: u8 = 0x04;
const PUD: u8 = 0x08;
const ZERO: u8 = 0x10;
const PRIVATE_LOCAL: u8 = 0x20;
const COHERENT_LOCAL: u8 = 0x40;
const COHERENT_REMOTE: u8 = 0x50;

/// The byte for a page that the device of `own`, which is of such a kind, sees so.
pub(crate) fn byte(view: PageView, own: Owner, kind: Kind) -> u8 {
    let permitted = if view.may_write() { WRITE } else { READ };
    match view {
        PageView::Error(_) => ERROR,
        // A page that is somebody's alone is not to be seen either.
        PageView::Absent | PageView::Exclusive { .. } => NONE,
        PageView::Zeros => ZERO | READ,
        PageView::Ram { order: Geometry::K4, .. } => permitted,
        PageView::Ram { order: Geometry::M2, .. } => PMD | permitted,
        PageView::Ram { order: Geometry::G1, .. } => PUD | permitted,
        // Others' private pages are not told of.
        PageView::Device { .. } => match kind {
            Kind::Private => PRIVATE_LOCAL | permitted,
            // Not mapped in place, because it may not be written.
            Kind::Coherent => COHERENT_LOCAL | permitted,
        },
        PageView::Coherent { owner, .. } if owner == own => COHERENT_LOCAL | permitted,
        PageView::Coherent { .. } => COHERENT_REMOTE | permitted,
    }
}
