# Dump the database of studies into $BACKUP, and check that the dump can be read.
set -eu
pg_dump --dbname "$MAPPO_DATABASE" --format custom --no-owner --file "$BACKUP/mappo.dump"
pg_restore --list "$BACKUP/mappo.dump" >/dev/null
echo "dumped $(wc -c <"$BACKUP/mappo.dump") bytes"
