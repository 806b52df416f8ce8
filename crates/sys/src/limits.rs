//! Room below the limit of open files, for a moment.
//!
//! What     [`MoreFiles`] raises the soft limit of this process as far as the hard one lets it, and takes that back.
//! Why      the message that tells of a fork brings a descriptor. A program that has lowered its limit and then
//!          forks would wait for ever for that message to be read.
//! Races    a limit that the program sets meanwhile stays.
//! Fails    in silence: then there is no more room than before.

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

/// Enough for a handful of descriptors, whatever is open.
const ENOUGH: u64 = 4096;

/// The limit is raised while this lives.
#[derive(Debug)]
pub struct MoreFiles {
    before: Option<Rlimit>,
    raised: Rlimit,
}

impl MoreFiles {
    /// Raises the limit.
    #[must_use = "dropped at once, it is of no use"]
    pub fn allow() -> Self {
        let now = getrlimit(Resource::Nofile);
        let most = now.maximum.unwrap_or(ENOUGH).min(ENOUGH);
        let raised = Rlimit { current: Some(most), ..now };
        let higher = now.current.is_some_and(|current| current < most);
        let before = if higher { prlimit(None, Resource::Nofile, raised).ok() } else { None };
        Self { before, raised }
    }
}

impl Drop for MoreFiles {
    fn drop(&mut self) {
        if let Some(before) = self.before.take()
            && getrlimit(Resource::Nofile) == self.raised
        {
            let _ = prlimit(None, Resource::Nofile, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_limit_is_lowered_again_unless_somebody_sets_it() {
        let first = getrlimit(Resource::Nofile);
        let low = Rlimit { current: Some(64), ..first };
        prlimit(None, Resource::Nofile, low).unwrap();
        let more = MoreFiles::allow();
        assert!(getrlimit(Resource::Nofile).current > Some(64));
        drop(more);
        assert_eq!(getrlimit(Resource::Nofile), low);
        let more = MoreFiles::allow();
        let own = Rlimit { current: Some(128), ..first };
        prlimit(None, Resource::Nofile, own).unwrap();
        drop(more);
        assert_eq!(getrlimit(Resource::Nofile), own);
        prlimit(None, Resource::Nofile, first).unwrap();
    }
}
