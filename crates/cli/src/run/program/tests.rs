use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A directory that is gone at the end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("uhmm-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, mode: u32, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The least that is an ELF file, with segments of these kinds.
fn an_elf(class: u8, machine: u16, kinds: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
    bytes[18..20].copy_from_slice(&machine.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = kinds.len() as u8;
    for kind in kinds {
        bytes.extend(kind.to_le_bytes());
        bytes.resize(bytes.len() + 52, 0);
    }
    bytes
}

fn helpless(path: &Path) -> Option<Helpless> {
    inspect(path).unwrap().helpless.map(|(_, why)| why)
}

#[test]
fn what_can_be_helped_is_told_from_what_cannot() {
    let place = Place::new("kinds");
    let dynamic = an_elf(2, 62, &[6, 3, 1]);
    let cases: [(&str, u32, Vec<u8>, Option<Helpless>); 7] = [
        ("dynamic", 0o755, dynamic.clone(), None),
        ("static", 0o755, an_elf(2, 62, &[6, 1]), Some(Helpless::Static)),
        ("setuid", 0o4755, dynamic.clone(), Some(Helpless::Setuid)),
        ("setgid", 0o2755, dynamic.clone(), Some(Helpless::Setuid)),
        ("narrow", 0o755, an_elf(1, 3, &[3]), Some(Helpless::Foreign)),
        ("arm", 0o755, an_elf(2, 183, &[3]), Some(Helpless::Foreign)),
        ("cut", 0o755, dynamic[..70].to_vec(), Some(Helpless::Foreign)),
    ];
    for (name, mode, bytes, wanted) in cases {
        assert_eq!(helpless(&place.file(name, mode, &bytes)), wanted, "{name}");
    }
    assert_eq!(helpless(Path::new("/proc/self/exe")), None);
}

#[test]
fn scripts_are_followed_to_their_interpreters() {
    let place = Place::new("scripts");
    let fixed = place.file("fixed", 0o755, &an_elf(2, 62, &[1]));
    let line = |interpreter: &Path| format!("#! {} -x\necho", interpreter.display()).into_bytes();
    let script = place.file("script", 0o755, &line(&fixed));
    let twice = place.file("twice", 0o4755, &line(&script));
    let found = inspect(&twice).unwrap();
    assert_eq!(found, Program { path: twice, helpless: Some((fixed, Helpless::Static)) });
    // Without a first line, the shell gets it.
    assert_eq!(helpless(&place.file("plain", 0o755, b"echo hello\n")), None);
    let lost = place.file("lost", 0o755, b"#!/nowhere/at/all\n");
    assert!(matches!(inspect(&lost), Err(ProgramError::NotExecutable(path, _)) if path == lost));
    let circle = place.0.join("circle");
    place.file("circle", 0o755, &line(&circle));
    assert!(matches!(inspect(&circle), Err(ProgramError::NotExecutable(..))));
}

#[test]
fn as_many_interpreters_are_followed_as_the_kernel_follows() {
    let place = Place::new("depth");
    let mut interpreter = PathBuf::from("/bin/true");
    for depth in 1..=6 {
        let text = format!("#!{}\n", interpreter.display());
        interpreter = place.file(&format!("script-{depth}"), 0o755, text.as_bytes());
        let started = std::process::Command::new(&interpreter).status();
        assert_eq!(inspect(&interpreter).is_ok(), started.is_ok(), "{depth}: {started:?}");
    }
}

#[test]
fn names_are_looked_up_as_execvp_does() {
    let (one, two) = (Place::new("one"), Place::new("two"));
    let dynamic = an_elf(2, 62, &[3]);
    one.file("both", 0o644, &dynamic);
    let good = two.file("both", 0o755, &dynamic);
    one.file("shy", 0o644, &dynamic);
    let path = OsString::from(format!("/nowhere:{}:{}", one.0.display(), two.0.display()));
    let find = |name: &str| find(OsStr::new(name), Some(path.clone()));
    assert_eq!(find("both").unwrap().path, good);
    assert!(matches!(find("shy"), Err(ProgramError::NotExecutable(..))));
    for missing in ["none", "", "/nowhere/none", "both/more"] {
        assert!(matches!(find(missing), Err(ProgramError::NotFound(_))), "{missing:?}");
    }
    let directory = one.0.to_str().unwrap().to_owned();
    assert!(matches!(find(&directory), Err(ProgramError::NotExecutable(..))));
    assert_eq!(super::find(OsStr::new("sh"), None).unwrap().helpless, None);
}

#[test]
fn no_bytes_are_a_panic() {
    let whole = an_elf(2, 62, &[6, 3, 1]);
    for len in 0..whole.len() {
        for at in 0..len {
            let mut bytes = whole[..len].to_vec();
            bytes[at] = 0xff;
            let read = |buffer: &mut [u8], offset: u64| {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                match bytes.get(start..).and_then(|rest| rest.get(..buffer.len())) {
                    Some(found) => {
                        buffer.copy_from_slice(found);
                        true
                    }
                    None => false,
                }
            };
            let _ = (elf(&bytes[..len.min(LINE)], read), interpreter(&bytes));
        }
    }
}
