//! The command line of `uhmm dax`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Subcommand;
use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::store::Mode;

/// An alignment as it is typed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Align(pub(crate) Geometry);

impl FromStr for Align {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = text.parse::<ByteSize>().map_err(|why| why.to_string())?.bytes();
        let known = [Geometry::K4, Geometry::M2, Geometry::G1];
        let found = known.into_iter().find(|geometry| geometry.bytes() as u64 == bytes);
        found
            .map(Self)
            .ok_or_else(|| format!("{bytes} bytes is no alignment; the alignments are 4K, 2M and 1G"))
    }
}

/// A namespace as it is typed: `dax0.1`, `0.1`, or `1`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Name {
    /// The store's number, if it was said.
    pub(crate) region: Option<u32>,
    /// The namespace's.
    pub(crate) id: u32,
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            part.parse().ok().filter(|_| digits)
        };
        let found = match text.strip_prefix("dax").unwrap_or(text).split_once('.') {
            Some((region, id)) => {
                number(region).zip(number(id)).map(|(region, id)| Self { region: Some(region), id })
            }
            None => number(text).map(|id| Self { region: None, id }),
        };
        found.ok_or_else(|| format!("{text:?} names no namespace; write dax0.1, as `uhmm dax list` shows it"))
    }
}

/// What to do with a store.
#[derive(Subcommand, Debug)]
pub(crate) enum DaxVerb {
    /// Make a namespace, and the store around it if there is none
    Create {
        /// The store: a file, on a file system of huge pages for faults of 2M and 1G
        store: PathBuf,
        /// How large the store is to be; only for one that does not exist
        #[arg(long, value_name = "SIZE")]
        capacity: Option<ByteSize>,
        /// The X in daxX.Y; only for a store that does not exist
        #[arg(long, value_name = "X", requires = "capacity")]
        region: Option<u32>,
        /// How large the namespace is to be; without it, all that is free
        #[arg(long, short, value_name = "SIZE")]
        size: Option<ByteSize>,
        /// In which pages it is mapped: 4K, 2M or 1G
        #[arg(long, short, value_name = "ALIGN")]
        align: Option<Align>,
        /// What it is for: devdax (mapped by programs), fsdax (files) or system-ram (slower RAM of a space)
        #[arg(long, short, value_name = "MODE", default_value_t)]
        mode: Mode,
        /// What it is called, at most 63 bytes
        #[arg(long, short, value_name = "NAME", default_value = "")]
        name: String,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what is in a store
    List {
        /// The store
        store: PathBuf,
        /// As JSON, in the form of `daxctl list`
        #[arg(long)]
        json: bool,
        /// JSON with the store around its devices (`daxctl list --regions --devices`)
        #[arg(long, short = 'R', requires = "json", conflicts_with = "namespaces")]
        regions: bool,
        /// JSON with where each device lies (`daxctl list --mappings`)
        #[arg(long, short = 'M', requires = "json", conflicts_with = "namespaces")]
        mappings: bool,
        /// JSON in the form of `ndctl list --namespaces --media-errors`
        #[arg(long, short = 'N', requires = "json")]
        namespaces: bool,
    },
    /// Give a namespace that nobody uses another size
    Resize {
        /// The store
        store: PathBuf,
        /// The namespace, such as dax0.1
        device: Name,
        /// Its new size
        size: ByteSize,
    },
    /// Give the space of a namespace that nobody uses back
    Destroy {
        /// The store
        store: PathBuf,
        /// The namespace, such as dax0.1
        device: Name,
    },
    /// Change what a namespace that nobody uses is for; its bytes stay
    Reconfigure {
        /// The store
        store: PathBuf,
        /// The namespace, such as dax0.1
        device: Name,
        /// What it is for: devdax (mapped by programs), fsdax (files) or system-ram (slower RAM of a space)
        #[arg(long, short, value_name = "MODE", required_unless_present_any = ["align", "name"])]
        mode: Option<Mode>,
        /// In which pages it is mapped: 4K, 2M or 1G
        #[arg(long, short, value_name = "ALIGN")]
        align: Option<Align>,
        /// What it is called
        #[arg(long, short, value_name = "NAME")]
        name: Option<String>,
    },
    /// Say that pages are bad: whoever maps them gets SIGBUS
    InjectError {
        /// The store
        store: PathBuf,
        /// The namespace, such as dax0.1
        device: Name,
        /// Where they begin in it, a multiple of 4K
        #[arg(long, short, value_name = "SIZE")]
        offset: ByteSize,
        /// How much, a multiple of 4K
        #[arg(long, short, value_name = "SIZE", default_value = "4K")]
        len: ByteSize,
    },
    /// Mend bad pages by writing them anew, with zeros
    ClearError {
        /// The store
        store: PathBuf,
        /// The namespace, such as dax0.1
        device: Name,
        /// Where to begin in it, a multiple of 4K; without it, all of it
        #[arg(long, short, value_name = "SIZE", requires = "len")]
        offset: Option<ByteSize>,
        /// How much, a multiple of 4K
        #[arg(long, short, value_name = "SIZE", requires = "offset")]
        len: Option<ByteSize>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_three_names() {
        for (text, region) in [("dax3.12", Some(3)), ("3.12", Some(3)), ("12", None)] {
            assert_eq!(text.parse(), Ok(Name { region, id: 12 }));
        }
        for text in ["", "dax", "dax12", "dax1.", ".1", "1.2.3", "+1", "dax-1.2", "99999999999"] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_alignment_is_one_of_three() {
        for (text, align) in
            [("4096", Geometry::K4), ("2M", Geometry::M2), ("2MiB", Geometry::M2), ("1G", Geometry::G1)]
        {
            assert_eq!(text.parse(), Ok(Align(align)));
        }
        assert!("64K".parse::<Align>().unwrap_err().starts_with("65536 bytes is no alignment"));
    }
}
