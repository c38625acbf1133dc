use std::io::Write;

use super::*;

const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

fn compress(format: Format, content: &[u8]) -> Vec<u8> {
    match format {
        Format::Estargz => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            gzip.write_all(content).unwrap();
            gzip.finish().unwrap()
        }
        Format::ZstdChunked => zstd::bulk::compress(content, 3).unwrap(),
    }
}

fn wanted(content: &[u8], from: usize, to: usize) -> Wanted {
    Wanted {
        inner_offset: from as u64,
        size: (to - from) as u64,
        digest: Digest::of(&content[from..to]),
    }
}

fn decode(
    format: Format,
    compressed: &[u8],
    wanted: &[Wanted],
) -> Result<Vec<(usize, Vec<u8>)>, DecodeError> {
    let mut got = Vec::new();
    decode_unit(format, compressed, wanted, |index, chunk| {
        got.push((index, chunk.to_vec()));
    })?;
    Ok(got)
}

#[test]
fn wanted_chunks_come_in_order_and_the_rest_is_skipped() {
    let content: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    for format in FORMATS {
        let compressed = compress(format, &content);
        let list = [
            wanted(&content, 0, 10),
            wanted(&content, 10, 11),
            wanted(&content, 11, 11),
            wanted(&content, 500, 70_000),
            wanted(&content, 500, 70_000),
            wanted(&content, 799_999, 800_000),
        ];
        let got = decode(format, &compressed, &list).unwrap();
        let expected: Vec<_> = list
            .iter()
            .enumerate()
            .map(|(index, chunk)| {
                let from = chunk.inner_offset as usize;
                (index, content[from..from + chunk.size as usize].to_vec())
            })
            .collect();
        assert!(got == expected);
        assert_eq!(decode(format, &compressed, &[]).unwrap(), []);
    }
}

#[test]
fn a_unit_may_go_on_in_the_next_member_and_end_in_anything() {
    for format in FORMATS {
        let mut compressed = compress(format, b"first ");
        compressed.extend(compress(format, b"second"));
        compressed.extend(b"garbage");
        let got = decode(format, &compressed, &[wanted(b"first second", 3, 12)]).unwrap();
        assert_eq!(got, [(0, b"st second".to_vec())]);
    }
}

#[test]
fn wrong_content_is_never_handed_out() {
    let content: Vec<u8> = (0..50_000u32).flat_map(u32::to_le_bytes).collect();
    for format in FORMATS {
        let good = compress(format, &content);
        let list = [wanted(&content, 0, 1000), wanted(&content, 1000, 150_000)];
        for at in (0..good.len()).step_by(97) {
            let mut bad = good.clone();
            bad[at] ^= 0x41;
            // Damage that does not show in the content is no damage.
            if let Ok(got) = decode(format, &bad, &list) {
                assert!(got[0].1 == content[..1000] && got[1].1 == content[1000..150_000]);
            }
        }
        let other = compress(format, &vec![7; content.len()]);
        let mut handed_out = 0;
        let refused = decode_unit(format, &other, &list, |_, _| handed_out += 1).unwrap_err();
        assert!(matches!(refused, DecodeError::Mismatch { index: 0, .. }));
        assert_eq!(handed_out, 0);
    }
}

#[test]
fn short_data_is_an_error_wherever_it_ends() {
    let content: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
    for format in FORMATS {
        let good = compress(format, &content);
        let list = [wanted(&content, 0, content.len())];
        assert!(decode(format, &good, &list).is_ok());
        for length in (0..good.len() - 20).step_by(101) {
            assert!(decode(format, &good[..length], &list).is_err(), "{length}");
        }
        let beyond = Wanted {
            inner_offset: content.len() as u64,
            size: 1,
            digest: Digest::of(b"x"),
        };
        assert!(matches!(
            decode(format, &good, &[beyond]),
            Err(DecodeError::Truncated { got: 0, .. })
        ));
    }
}

#[test]
fn lying_sizes_and_orders_are_refused() {
    for format in FORMATS {
        let compressed = compress(format, b"content");
        let lie = Wanted {
            inner_offset: 2,
            size: u64::MAX,
            digest: Digest::of(b""),
        };
        assert!(matches!(
            decode(format, &compressed, &[lie]),
            Err(DecodeError::Truncated { got: 5, .. })
        ));
        let far = Wanted {
            inner_offset: u64::MAX,
            ..lie
        };
        assert!(decode(format, &compressed, &[far]).is_err());
        let list = [wanted(b"content", 0, 4), wanted(b"content", 3, 5)];
        assert!(matches!(
            decode(format, &compressed, &list),
            Err(DecodeError::Order { index: 1 })
        ));
    }
}

#[test]
fn a_bomb_is_decoded_no_further_than_wanted() {
    let zeros = vec![0; 64 << 20];
    for format in FORMATS {
        let compressed = compress(format, &zeros);
        let got = decode(format, &compressed, &[wanted(&zeros, 0, 4096)]).unwrap();
        assert_eq!(got[0].1.len(), 4096);
    }
}

#[test]
fn lying_frames_cost_no_memory() {
    // A frame header that promises 2^62 bytes, and nothing behind it.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
    frame.extend((1u64 << 62).to_le_bytes());
    frame.extend([1, 0, 0]);
    let lie = Wanted {
        inner_offset: 0,
        size: 1 << 61,
        digest: Digest::of(b""),
    };
    assert!(decode(Format::ZstdChunked, &frame, &[lie]).is_err());
    // A gzip trailer that promises 4 GiB.
    let mut member = compress(Format::Estargz, b"small");
    let end = member.len();
    member[end - 4..].fill(0xff);
    assert!(decode(Format::Estargz, &member, &[lie]).is_err());
    let got = decode(Format::Estargz, &member, &[wanted(b"small", 0, 5)]).unwrap();
    assert_eq!(got, [(0, b"small".to_vec())]);
}

/// Whole units take another path than those that end in something else.
#[test]
fn both_ways_of_decoding_agree() {
    let content: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    for format in FORMATS {
        let whole = compress(format, &content);
        let more = [&whole[..], b"garbage"].concat();
        let list = [
            wanted(&content, 5, 70_000),
            wanted(&content, 5, 70_000),
            wanted(&content, 80_000, 1_000_000),
        ];
        let got = decode(format, &whole, &list).unwrap();
        assert!(got == decode(format, &more, &list).unwrap());
        let cut = &whole[..whole.len() - 1];
        assert!(got == decode(format, cut, &list).unwrap());
        // Wanted is little, so the rest is not decoded.
        let start = [wanted(&content, 5, 10)];
        assert_eq!(decode(format, &whole, &start).unwrap()[0].1, content[5..10]);
    }
}
