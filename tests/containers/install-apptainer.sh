#!/usr/bin/env bash
# Installs Apptainer on Debian or Ubuntu, as root; does nothing where it is installed.
#
# Where the distribution has it, apt brings it. Debian 12 does not: then sid's package is taken,
# and because its two programs want a newer C library than the system's, they are given one of
# their own, in a folder of theirs (the interpreter and rpath in their ELF headers point to it).
# apt checks every signature; the machine's own sources stay as they are.
set -euo pipefail
export PATH=/usr/local/sbin:/usr/sbin:/sbin:$PATH DEBIAN_FRONTEND=noninteractive
apt=(apt-get -o DPkg::Lock::Timeout=300 -qq)
install=("${apt[@]}" install -y --no-install-recommends)
fail() { echo "install-apptainer: $*" >&2; exit 2; }

# --fakeroot wants subordinate ids, for root too.
subordinate() {
  local file
  for file in /etc/subuid /etc/subgid; do
    grep -qs '^root:' "$file" || echo root:200000:65536 >>"$file"
  done
}
if command -v apptainer >/dev/null && apptainer version >/dev/null 2>&1; then
  subordinate
  echo "apptainer $(apptainer version) is here"
  exit 0
fi
[ "$(id -u)" = 0 ] || fail "only root can install it"
command -v apt-get >/dev/null || fail "no apt-get here; see https://apptainer.org/docs/admin"

"${apt[@]}" update
"${install[@]}" squashfs-tools squashfuse fuse-overlayfs fuse3 uidmap ca-certificates \
  e2fsprogs debootstrap >/dev/null
if apt-cache policy apptainer | grep -q 'Candidate: [0-9]'; then
  "${install[@]}" apptainer >/dev/null
else
  keys=/usr/share/keyrings/debian-archive-keyring.gpg
  [ -r "$keys" ] || fail "this system's sources have no apptainer, and it is no Debian"
  [ "$(dpkg --print-architecture)" = amd64 ] || fail "only amd64 packages can be fitted here"
  "${install[@]}" patchelf >/dev/null
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  chmod 755 "$work"
  mkdir -p "$work"/lists/partial "$work"/cache/archives/partial
  mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -n 1)
  for suite in trixie sid; do
    echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} $suite main"
  done >"$work/sources.list"
  apart=(-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
  "${apt[@]}" "${apart[@]}" update
  libc=$(apt-cache "${apart[@]}" madison libc6 | awk '/trixie\/main/ {print $3; exit}')
  (cd "$work" && "${apt[@]}" "${apart[@]}" download apptainer "libc6=$libc")
  dpkg-deb -R "$work"/apptainer_*.deb "$work/package"
  dpkg-deb -x "$work"/libc6_*.deb "$work/libc"
  system=/usr/lib/x86_64-linux-gnu
  own=$system/apptainer/glibc
  mkdir -p "$work/package$own"
  for library in ld-linux-x86-64.so.2 libc.so.6 libm.so.6 libpthread.so.0 libdl.so.2 librt.so.1 \
    libresolv.so.2 libnss_dns.so.2 libnss_files.so.2; do
    cp -L "$work/libc$system/$library" "$work/package$own/"
  done
  for program in usr/bin/apptainer "${system#/}/apptainer/bin/starter"; do
    patchelf --force-rpath --set-interpreter "$own/ld-linux-x86-64.so.2" \
      --set-rpath "$own:$system" "$work/package/$program"
  done
  sed -i 's/libc6 (>= 2\.3[0-9])/libc6 (>= 2.36)/; s/^Version: .*/&~fitted/' \
    "$work/package/DEBIAN/control"
  rm -f "$work/package/DEBIAN/md5sums"
  dpkg-deb -Znone -b "$work/package" "$work/fitted.deb" >/dev/null
  "${install[@]}" "$work/fitted.deb" >/dev/null
fi
subordinate
echo "apptainer $(apptainer version) installed"
