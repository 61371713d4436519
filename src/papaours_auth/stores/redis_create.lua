-- The first entry of a partition's log, and of the store's mark where KEYS names it: each unless it is there.
-- KEYS: changes, and in the last partition the mark. ARGV: nonce, text, installation, schema, "m" in a partition of keys.
if KEYS[2] then
  redis.call('HSETNX', KEYS[2], 'installation', ARGV[3])
  redis.call('HSETNX', KEYS[2], 'schema', ARGV[4])
end
if redis.call('LLEN', KEYS[1]) == 0 then
  local time = redis.call('TIME')
  redis.call('RPUSH', KEYS[1], string.format('1 %s %d%06d%s %s', ARGV[1], time[1], time[2], ARGV[5], ARGV[2]))
end
return 1
