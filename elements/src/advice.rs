//! What is hardly ever meant, and is not wrong: said where a graph is checked and where it begins to serve.

use blockmason::lang::{ElementSpec, Spec};

/// A sentence for each pair of elements that stand the wrong way round.
pub fn advice(spec: &Spec) -> Vec<String> {
    let mut said = Vec::new();
    for (ix, upper) in spec.elements.iter().enumerate() {
        let below = spec.reached(ix).into_iter().skip(1).map(|ix| &spec.elements[ix]);
        for lower in below {
            if let Some(why) = wrong_way_round(upper, lower) {
                said.push(format!("{} ({}): {why}", upper.name, spec.place(upper)));
            }
        }
    }
    said
}

fn wrong_way_round(upper: &ElementSpec, lower: &ElementSpec) -> Option<String> {
    let name = &lower.name;
    match (upper.ty.as_str(), lower.ty.as_str()) {
        ("cache", "crypto") if upper.params.get("path").is_some() => Some(format!(
            "what this cache keeps on its SSD is readable there, for {name} encrypts below it: put the cache below {name}"
        )),
        ("crypto", "compress") => {
            Some(format!("what is encrypted does not get smaller: put {name} above this element"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::advice;
    use blockmason::testing::checked;

    fn said(text: &str) -> Vec<String> {
        advice(&checked(crate::ALL, text).unwrap())
    }

    #[test]
    #[cfg(all(feature = "crypto", feature = "compress"))]
    fn what_stands_the_wrong_way_round_is_named() {
        let graph = |chain: &str| {
            format!(
                "element Guest (type nbd)
                 element Ram (type cache) (size 64M)
                 element Ssd (type cache) (path ssd) (size 64M)
                 element Secret (type crypto) (key_file key)
                 element Small (type compress)
                 element Disk (type mem) (size 64M)
                 Guest -> {chain} -> Disk"
            )
        };
        assert_eq!(said(&graph("Ram -> Small -> Secret -> Ssd")), [""; 0]);
        let wrong = said(&graph("Ram -> Ssd -> Secret -> Small"));
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(
            wrong[0].starts_with("Ssd (test.mason:3:") && wrong[0].contains("put the cache below Secret")
        );
        assert!(wrong[1].starts_with("Secret (test.mason:4:") && wrong[1].contains("put Small above"));
    }
}
